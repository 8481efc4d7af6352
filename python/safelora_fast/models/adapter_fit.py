"""Whether an adapter on disk fits a model, from its header alone: which module each tensor meets, and how many tokens there are.

Every command that puts an adapter on a model asks here first, so that none measures anything before it finds that the adapter
belongs to another model. Modules are paired by name as a projection pairs them, so that what can be projected can be measured.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safelora_fast import _core
from safelora_fast.checkpoints.adapter import WEIGHTS, parameters_of, read_config
from safelora_fast.checkpoints.adapter_keys import PREFIX, is_targeted, peft_keys
from safelora_fast.checkpoints.tensor_names import NameIndex, tower_of
from safelora_fast.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    from torch import nn

# What may follow the name of a module: factors, what only an adapter has, and the module's own tensors.
FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
OWN = (".lora_B.bias", ".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta")
WHOLE = (".base_layer.weight", ".base_layer.bias")
# Modules that transformers renames or fuses while loading: PEFT converts adapters of them, so their names are its business.
CONVERTED = re.compile(r"(^|.*\.)(experts|block_sparse_moe)(\..*|$)")


@dataclass(frozen=True)
class Fit:
    """How an adapter meets a model.

    Attributes:
        folder: of the adapter.
        config: of the adapter.
        keys: for each key of its file the one under which PEFT finds the tensor in this model; empty where PEFT reads another
            kind of file or adapter, of which nothing is checked here.
        modules: for each module of the model that has factors its name in the adapter, and the factors' rank.
        vocabulary: how many tokens the model needs, None where it has them.
        full: keys of the tensors that PEFT puts in the place of the model's own, with the names that these have.
    """

    folder: Path
    config: Mapping[str, Any]
    keys: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    vocabulary: int | None = None
    full: Mapping[str, str] = field(default_factory=dict)

    @property
    def renamed(self) -> bool:
        """Whether PEFT would look for some tensors under other keys."""
        return any(key != new for key, new in self.keys.items())


def fit_adapter(folder: Path, model: nn.Module) -> Fit:
    """Pair an adapter's tensors with the modules of a model, which may be without weights (on the meta device).

    Args:
        folder: of the adapter.
        model: a model of transformers without an adapter.

    Raises:
        AdapterError: it holds no adapter, or one that does not fit: a module, a shape or tokens that the model does not have.
        CheckpointError: its file is damaged.
    """
    config = read_config(folder)
    if config.get("peft_type") != "LORA" or not (folder / WEIGHTS).is_file():
        return Fit(folder, config)
    return _Pairing(folder, config, model).fit()


class _Pairing:
    def __init__(self, folder: Path, config: Mapping[str, Any], model: nn.Module) -> None:
        self.folder, self.config = folder, config
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names = NameIndex(name for name in self.modules if name)
        self.shapes = {
            key: shape for key, (_, shape, *_) in _core.SafetensorsFile(str(folder / WEIGHTS)).tensors.items()
        }
        self.tower = tower_of(config)
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        self.embeddings = [module for module in ends if module is not None]

    def fit(self) -> Fit:
        keys: dict[str, str] = {}
        modules: dict[str, tuple[str, int]] = {}
        heights: dict[int, str] = {}
        full: dict[str, str] = {}
        targets = self.config.get("target_parameters") or []
        for key, new in peft_keys(self.folder, self.shapes).items():
            name, ending = self._split(new.removeprefix(PREFIX))
            if CONVERTED.fullmatch(name) or parameters_of(name, targets):
                keys[key] = new
                continue
            found = self._module(key, name)
            keys[key] = f"{PREFIX}{found}{ending}"
            if ending in FACTORS:
                modules[found] = name, self.shapes[key][-(FACTORS.index(ending) % 2)]  # A is (r, n), B is (m, r)
            elif ending not in OWN and not ending.startswith(".lora_"):
                full[key] = f"{found}.{ending.rpartition('.')[2]}"
            if height := self._check_shape(key, found, ending):
                heights.setdefault(height, key)
        fit = Fit(self.folder, self.config, keys, modules, self._vocabulary(heights, full.values()), full)
        if not fit.renamed:
            self._check_complete(modules)
        return fit

    def _split(self, name: str) -> tuple[str, str]:
        """A tensor's name as that of its module, and the rest."""
        for ending in (*FACTORS, *OWN, *WHOLE):
            if name.endswith(ending):
                return name.removesuffix(ending), ending
        module, dot, leaf = name.rpartition(".")
        return module, dot + leaf

    def _module(self, key: str, name: str) -> str:
        """The one module of this name."""
        found = self.names.find(name, self.tower)
        if len(found) == 1:
            return found[0]
        if found:
            raise AdapterError(
                f"{self.folder}: {key} may belong to several modules of the model: {', '.join(sorted(found)[:3])}"
            )
        near = difflib.get_close_matches(name, list(self.modules), n=1, cutoff=0)
        raise AdapterError(
            f"{self.folder}: holds weights for modules that this model does not have, e.g. {key} (the nearest is {near[0]}): was "
            "it trained on another one?"
        )

    def _check_shape(self, key: str, name: str, ending: str) -> int | None:
        """Refuse a tensor that its module cannot take; the tokens that it is for where the model has another number of them."""
        module, shape = self.modules[name], self.shapes[key]
        weight = getattr(module, "weight" if ending in FACTORS else ending.rpartition(".")[2], None)
        if ending in OWN or weight is None or (ending in FACTORS and weight.dim() != 2):
            return None  # of a kind that PEFT knows, or refuses
        if not weight.is_floating_point():
            return None  # quantized: of 4 bits, its shape is that of packed bytes
        expected, tokens = dict(enumerate(weight.shape)), 0
        if ending in FACTORS:
            out, inner = tuple(weight.shape)[:: -1 if type(module).__name__ == "Conv1D" else 1]
            tokens, axis, size = ((-1, 1, inner), (0, 0, out), (1, 1, out), (-1, 0, inner))[FACTORS.index(ending)]
            expected = {axis: size}
        of_its_kind = len(shape) == weight.dim()
        differing = [axis for axis, size in expected.items() if not of_its_kind or shape[axis] != size]
        if not differing:
            return None
        if of_its_kind and differing == [tokens] and any(module is one for one in self.embeddings):
            return shape[tokens]
        raise self._misfit(key, name, tuple(weight.shape))

    def _check_complete(self, modules: Collection[str]) -> None:
        """Refuse an adapter without factors for a module that its configuration asks for: PEFT would leave them zero."""
        if self.config.get("target_modules") in (None, [], "all-linear"):
            return
        saved = in_full(self.config)
        for name, module in self.modules.items():
            weight = getattr(module, "weight", None)
            if weight is None or weight.dim() != 2 or name in modules or CONVERTED.fullmatch(name) or saved(name):
                continue
            if is_targeted(name, self.config):
                raise AdapterError(
                    f"{self.folder}: lacks weights for modules of this model: was it trained on another one? The first is {name}"
                )

    def _misfit(self, key: str, name: str, shape: tuple[int, ...]) -> AdapterError:
        return AdapterError(
            f"{self.folder}: {key} is {list(self.shapes[key])}, but {name} of this model is {list(shape)}: was it trained on "
            "another one?"
        )

    def _vocabulary(self, heights: Mapping[int, str], full: Collection[str]) -> int | None:
        """How many tokens the model must have for the adapter, None for as many as it has.

        Raises:
            AdapterError: tensors disagree, or the adapter does not hold what the model's added tokens are.
        """
        there = self.embeddings[0].weight.shape[0] if self.embeddings else 0
        trained = max(_token_indices(self.config), default=-1) + 1
        if len(heights) > 1:
            words = " and ".join(f"{key} for {height}" for height, key in list(heights.items())[:2])
            raise AdapterError(f"{self.folder}: its tensors are for different numbers of tokens: {words}")
        wanted = next(iter(heights), trained if trained > there else None)
        if wanted is None:
            return None
        holders = [
            name for module in self.embeddings for name in [self._name_of(module)] if f"{name}.weight" not in full
        ]
        tied = len({id(module.weight) for module in self.embeddings}) == 1
        covered = set(_token_indices(self.config)) >= set(range(there, wanted))
        if wanted > there and not covered and (len(holders) == len(self.embeddings) if tied else holders):
            raise AdapterError(
                f"{self.folder}: was trained with {wanted} tokens, but the model has {there}, and the adapter does not hold "
                f"{holders[0]}.weight, so what the added tokens are is not known: save it with save_embedding_layers=True"
            )
        return wanted

    def _name_of(self, module: nn.Module) -> str:
        return next(str(name) for name, one in self.modules.items() if one is module)


def in_full(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a module is one that PEFT keeps a trained copy of (modules_to_save)."""
    patterns = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in config.get("modules_to_save") or []]
    return lambda name: any(pattern.match(name) for pattern in patterns)


def _token_indices(config: Mapping[str, Any]) -> Iterator[int]:
    """The tokens of trainable_token_indices, whatever the embeddings that they are of."""
    given = config.get("trainable_token_indices") or []
    for indices in given.values() if isinstance(given, dict) else [given]:
        yield from indices
