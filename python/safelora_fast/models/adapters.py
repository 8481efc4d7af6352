"""Checking that an adapter fits a loaded model, and attaching it with PEFT.

`fit_adapter` reads only the header of the adapter file. Every command that attaches an adapter calls it first, so an
adapter of another model is rejected before any measurement. Modules are paired by name as in a projection, so every
adapter that can be projected can also be measured.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast import _core
from safelora_fast.checkpoints.adapter import WEIGHTS, parameters_of, read_config
from safelora_fast.checkpoints.adapter_keys import PREFIX, is_targeted, peft_keys
from safelora_fast.checkpoints.tensor_names import NameIndex, tower_of
from safelora_fast.errors import AdapterError, SafeLoraFastError
from safelora_fast.models.foreign_errors import explained

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import nn

# Key suffixes after a module's name: LoRA matrices, tensors that only an adapter has, and the module's own tensors.
FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
ADAPTER_ONLY = (".lora_B.bias", ".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta")
WHOLE = (".base_layer.weight", ".base_layer.bias")
# Modules that transformers renames or fuses on loading. PEFT converts their adapters, so their names are not checked.
CONVERTED = re.compile(r"(^|.*\.)(experts|block_sparse_moe)(\..*|$)")
INCOMPLETE = "Found missing adapter keys"  # PEFT's warning
ANOTHER = "was it trained on another one?"


@dataclass(frozen=True)
class Fit:
    """How an adapter's tensors map to a model.

    Attributes:
        folder: the adapter's folder.
        config: the adapter's configuration.
        keys: maps each key of the adapter file to the key that PEFT expects for this model. Empty for other kinds of
            file or adapter, which are not checked.
        modules: maps each adapted module of the model to its name in the adapter and its LoRA rank.
        vocabulary: the vocabulary size to which the model must be resized; None if it already fits.
        full: maps the keys of tensors that replace the model's own to the names of the replaced tensors.
    """

    folder: Path
    config: Mapping[str, Any]
    keys: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    vocabulary: int | None = None
    full: Mapping[str, str] = field(default_factory=dict)

    @property
    def renamed(self) -> bool:
        """Whether any key differs from the key that PEFT expects."""
        return any(key != new for key, new in self.keys.items())


def fit_adapter(folder: Path, model: nn.Module) -> Fit:
    """Pair an adapter's tensors with the modules of a model, which may be on the meta device.

    Args:
        folder: the adapter's folder.
        model: a transformers model without an adapter.

    Raises:
        AdapterError: the folder has no adapter, or the adapter's modules, shapes or vocabulary do not fit the model.
        CheckpointError: the adapter file is damaged.
    """
    config = read_config(folder)
    if config.get("peft_type") != "LORA" or not (folder / WEIGHTS).is_file():
        return Fit(folder, config)
    return _Pairing(folder, config, model).fit()


def put_adapter(model: Any, folder: Path, *, name: str = "default", fit: Fit | None = None) -> Any:
    """Attach an adapter to a model and return the PeftModel.

    Args:
        model: a transformers model, which is modified: it gets the adapter's modules, and its vocabulary is resized if
            the adapter was trained with another vocabulary size. Or a PeftModel, which gets another adapter.
        folder: the adapter's folder.
        name: the adapter's name in the PeftModel.
        fit: the result of :func:`fit_adapter`; required for a PeftModel.

    Raises:
        AdapterError: the adapter does not fit the model.
    """
    from peft import PeftModel

    fit = fit_adapter(folder, model) if fit is None else fit
    try:
        if fit.vocabulary is not None:
            model.resize_token_embeddings(fit.vocabulary, mean_resizing=False)
        with warnings.catch_warnings(), _renamed_copy(fit) as where:
            warnings.filterwarnings("error", message=INCOMPLETE)
            if isinstance(model, PeftModel):
                model.load_adapter(str(where), adapter_name=name)
                adapted = model
            else:
                adapted = PeftModel.from_pretrained(model, str(where), adapter_name=name)
        _check_loaded(adapted, name, fit)
    except UserWarning as error:
        raise AdapterError(f"{folder}: lacks weights for modules of this model: {ANOTHER}") from error
    except SafeLoraFastError:
        raise
    except Exception as error:  # a hand-edited configuration can make PEFT raise any exception
        raise AdapterError(f"{folder}: the adapter cannot be put on the model: {explained(error)}") from error
    return adapted


def kept_in_full(config: Mapping[str, Any], module: str) -> bool:
    """Return whether PEFT keeps a trained copy of a module (modules_to_save)."""
    names = config.get("modules_to_save") or []
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in names)


class _Pairing:
    def __init__(self, folder: Path, config: Mapping[str, Any], model: nn.Module) -> None:
        self.folder, self.config = folder, config
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names = NameIndex(name for name in self.modules if name)
        tensors = _core.SafetensorsFile(str(folder / WEIGHTS)).tensors
        self.shapes = {key: shape for key, (_, shape, *_) in tensors.items()}
        self.tower = tower_of(config)
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        self.embeddings = [module for module in ends if module is not None]

    def fit(self) -> Fit:
        keys: dict[str, str] = {}
        modules: dict[str, tuple[str, int]] = {}
        vocabularies: dict[int, str] = {}  # vocabulary sizes, each with the first key of that size
        full: dict[str, str] = {}
        targets = self.config.get("target_parameters") or []
        for key, new in peft_keys(self.folder, self.shapes).items():
            name, ending = _split(new.removeprefix(PREFIX))
            if CONVERTED.fullmatch(name) or parameters_of(name, targets):
                keys[key] = new
                continue
            found = self._module(key, name)
            keys[key] = f"{PREFIX}{found}{ending}"
            if ending in FACTORS:
                modules[found] = name, self.shapes[key][-(FACTORS.index(ending) % 2)]  # A is (r, n), B is (m, r)
            elif ending not in ADAPTER_ONLY and not ending.startswith(".lora_"):
                full[key] = f"{found}.{ending.rpartition('.')[2]}"
            if tokens := self._check_shape(key, found, ending):
                vocabularies.setdefault(tokens, key)
        fit = Fit(self.folder, self.config, keys, modules, self._vocabulary(vocabularies, full.values()), full)
        if not fit.renamed:
            self._check_complete(modules)
        return fit

    def _module(self, key: str, name: str) -> str:
        """Return the model's only module with this name."""
        found = self.names.find(name, self.tower)
        if len(found) == 1:
            return found[0]
        if found:
            raise AdapterError(
                f"{self.folder}: {key} may belong to several modules of the model: {', '.join(sorted(found)[:3])}"
            )
        near = difflib.get_close_matches(name, list(self.modules), n=1, cutoff=0)
        raise AdapterError(
            f"{self.folder}: holds weights for modules that this model does not have, e.g. {key} (the nearest is {near[0]}): "
            f"{ANOTHER}"
        )

    def _check_shape(self, key: str, name: str, ending: str) -> int | None:
        """Refuse a tensor that does not fit its module; return the adapter's vocabulary size if the model's differs."""
        module, shape = self.modules[name], self.shapes[key]
        weight = getattr(module, "weight" if ending in FACTORS else ending.rpartition(".")[2], None)
        if ending in ADAPTER_ONLY or weight is None or (ending in FACTORS and weight.dim() != 2):
            return None  # PEFT accepts or rejects it
        if not weight.is_floating_point():
            return None  # quantized to 4 bits: the shape is that of packed bytes
        expected, tokens = dict(enumerate(weight.shape)), 0
        if ending in FACTORS:
            out, inner = tuple(weight.shape)[:: -1 if type(module).__name__ == "Conv1D" else 1]
            tokens, axis, size = ((-1, 1, inner), (0, 0, out), (1, 1, out), (-1, 0, inner))[FACTORS.index(ending)]
            expected = {axis: size}
        same_rank = len(shape) == weight.dim()
        differing = [axis for axis, size in expected.items() if not same_rank or shape[axis] != size]
        if not differing:
            return None
        if same_rank and differing == [tokens] and any(module is one for one in self.embeddings):
            return shape[tokens]
        raise AdapterError(
            f"{self.folder}: {key} is {list(shape)}, but {name} of this model is {list(weight.shape)}: {ANOTHER}"
        )

    def _check_complete(self, modules: Collection[str]) -> None:
        """Refuse an adapter that lacks weights for a module its configuration targets: PEFT would leave them zero."""
        if self.config.get("target_modules") in (None, [], "all-linear"):
            return
        for name, module in self.modules.items():
            weight = getattr(module, "weight", None)
            if weight is None or weight.dim() != 2 or name in modules or CONVERTED.fullmatch(name):
                continue
            if is_targeted(name, self.config) and not kept_in_full(self.config, name):
                raise AdapterError(
                    f"{self.folder}: lacks weights for modules of this model: {ANOTHER} The first is {name}"
                )

    def _vocabulary(self, found: Mapping[int, str], full: Collection[str]) -> int | None:
        """Return the vocabulary size that the adapter needs, or None if the model already has it.

        Raises:
            AdapterError: the adapter's tensors disagree, or it lacks the embeddings of the added tokens.
        """
        there = self.embeddings[0].weight.shape[0] if self.embeddings else 0
        indices = self.config.get("trainable_token_indices") or []
        trained = {token for part in (indices.values() if isinstance(indices, dict) else [indices]) for token in part}
        needed = max(trained, default=-1) + 1
        if len(found) > 1:
            words = " and ".join(f"{key} for {tokens}" for tokens, key in list(found.items())[:2])
            raise AdapterError(f"{self.folder}: its tensors are for different numbers of tokens: {words}")
        wanted = next(iter(found), needed if needed > there else None)
        if wanted is None:
            return None
        names = [next(name for name, one in self.modules.items() if one is module) for module in self.embeddings]
        missing = [name for name in names if f"{name}.weight" not in full]
        tied = len({id(module.weight) for module in self.embeddings}) == 1
        covered = trained >= set(range(there, wanted))
        if wanted > there and not covered and (len(missing) == len(names) if tied else missing):
            raise AdapterError(
                f"{self.folder}: was trained with {wanted} tokens, but the model has {there}, and the adapter does not hold "
                f"{missing[0]}.weight, so what the added tokens are is not known: save it with save_embedding_layers=True"
            )
        return wanted


def _split(name: str) -> tuple[str, str]:
    """Split a tensor's name into the module's name and the suffix."""
    for ending in (*FACTORS, *ADAPTER_ONLY, *WHOLE):
        if name.endswith(ending):
            return name.removesuffix(ending), ending
    module, dot, leaf = name.rpartition(".")
    return module, dot + leaf


@contextlib.contextmanager
def _renamed_copy(fit: Fit) -> Iterator[Path]:
    """Yield the adapter's folder, or a temporary copy whose tensors have the model's names."""
    if not fit.renamed:
        yield fit.folder
        return
    from peft import PeftConfig
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="safelora-fast-") as place:
        config: Any = PeftConfig.from_pretrained(str(fit.folder))
        _name_modules(config, fit)
        config.save_pretrained(place)
        tensors = {fit.keys[key]: tensor for key, tensor in load_file(fit.folder / WEIGHTS).items()}
        save_file(tensors, Path(place, WEIGHTS), {"format": "pt"})
        yield Path(place)


def _name_modules(config: Any, fit: Fit) -> None:
    """Rewrite a LoraConfig with the full names of the model's modules."""
    alphas, config.alpha_pattern, config.rank_pattern = config.alpha_pattern or {}, {}, {}
    for module, (former, rank) in fit.modules.items():
        key = re.escape(module)
        config.rank_pattern[key] = rank
        pattern = next((one for one in alphas if re.match(rf"(.*\.)?({one})$", former)), None)
        config.alpha_pattern[key] = config.lora_alpha if pattern is None else alphas[pattern]
    if not any(CONVERTED.fullmatch(key) for key in fit.keys):
        config.target_modules = sorted(fit.modules)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _check_loaded(adapted: Any, name: str, fit: Fit) -> None:
    """Refuse an adapter whose weights PEFT ignored, because its configuration does not target their modules."""
    from peft import get_peft_model_state_dict

    loaded = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    for key, new in fit.keys.items():
        if ".lora_" in new and new not in loaded and not CONVERTED.fullmatch(new):
            raise AdapterError(
                f"{fit.folder}: holds weights for modules that its configuration does not ask for (target_modules and the like), "
                f"e.g. {key}: PEFT leaves them out"
            )
