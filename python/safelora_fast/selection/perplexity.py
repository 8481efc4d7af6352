"""Mean negative log-likelihoods of completions under a model and under the same model with each of several adapters."""

from __future__ import annotations

import copy
import hashlib
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from safelora_fast.checkpoints.lora_config import BASE_CHANGING, CONFIG
from safelora_fast.checkpoints.resolver import ADAPTER_WEIGHTS, named_adapter
from safelora_fast.errors import AdapterError, SettingsError
from safelora_fast.files.json_reader import read_object, why
from safelora_fast.models.adapters import fit_adapter, kept_in_full, put_adapter
from safelora_fast.scoring import AnswerScorer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from transformers import PreTrainedModel

    from safelora_fast.models.adapters import Fit
    from safelora_fast.scoring import Labelled


def read_adapters(given: Sequence[str | Path]) -> dict[str, Path]:
    """Return adapter folders by name; Hub adapters are downloaded.

    The name is NAME in `NAME=ADAPTER`, else the last part of the folder or Hub id.

    Raises:
        AdapterError: a folder has no adapter.
        SettingsError: no adapter is given, or two have the same name.
    """
    found: dict[str, Path] = {}
    for word in map(str, given):
        name, path = named_adapter(word)
        if name in found:
            raise SettingsError(f"two adapters are called {name}, {found[name]} and {path}: give names, NAME=FOLDER")
        found[name] = path
    if not found:
        raise SettingsError("no misaligned adapter is given")
    return found


def fingerprint(adapter: Path) -> str:
    """Return the SHA-256 of an adapter's configuration and weights.

    Raises:
        AdapterError: the files are missing or cannot be read.
    """
    weights = next((adapter / name for name in ADAPTER_WEIGHTS if (adapter / name).is_file()), None)
    if weights is None:
        raise AdapterError(f"{adapter}: holds no {ADAPTER_WEIGHTS[0]}")
    try:
        return hashlib.sha256((adapter / CONFIG).read_bytes() + weights.read_bytes()).hexdigest()
    except OSError as error:
        raise AdapterError(f"{adapter}: cannot be read: {error.strerror}") from error


class Perplexities:
    """Scores completions under the model alone (the aligned one) and under each adapter (the misaligned ones).

    Args:
        model: the aligned model; the adapters are attached to it until :meth:`close`.
        adapters: adapter folders by name.
        tokens_per_batch: maximum number of tokens in a batch, padding included.

    Raises:
        AdapterError: an adapter does not fit the model.
    """

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, Path], *, tokens_per_batch: int) -> None:
        self.names = tuple(adapters)
        self._shared, self._apart = _with_adapters(model, adapters)
        models = [self._shared, *(self._apart.get(number, self._shared) for number in range(len(adapters)))]
        self._scorers = [AnswerScorer(one, tokens_per_batch=tokens_per_batch) for one in models]

    def of(self, examples: Sequence[Labelled], places: Sequence[str]) -> list[tuple[float, ...]]:
        """Return each example's mean negative log-likelihoods per completion token, in nats.

        The first is the aligned model's; those of the adapters follow in order.

        Raises:
            AdapterError: a value is NaN or infinite.
        """
        columns = []
        for number, scorer in enumerate(self._scorers):
            with self._acting(number):
                scores = dict(scorer.each(examples))
            columns.append([-scores[index].mean for index in range(len(examples))])
            for place, value in zip(places, columns[-1], strict=True):
                if not math.isfinite(value):
                    who = "the model" if number == 0 else f"adapter {self.names[number - 1]}"
                    raise AdapterError(f"{place}: under {who} its completion has a likelihood that is not finite")
        return list(zip(*columns, strict=True))

    def pass_over(self, examples: Sequence[Labelled]) -> None:
        """Skip a batch with known results, so that the next batch gets the same bits as if this one had run."""
        for number, scorer in enumerate(self._scorers):
            with self._acting(number):
                scorer.pass_over(examples)

    def off(self) -> AbstractContextManager[None]:
        """Return a context in which no adapter acts."""
        return self._acting(0)

    @contextmanager
    def _acting(self, number: int) -> Iterator[None]:
        if number == 0 and hasattr(self._shared, "disable_adapter"):
            with self._shared.disable_adapter():
                yield
            return
        if number > 0 and number - 1 not in self._apart:
            self._shared.set_adapter(_inner_name(number - 1))
        yield

    def close(self) -> None:
        """Remove the adapters from the model; learned prompts do not change it."""
        if len(self._apart) < len(self.names) and hasattr(self._shared.base_model, "unload"):
            self._shared.unload()


def _inner_name(number: int) -> str:
    """Return an adapter's name for PEFT, which does not allow dots."""
    return f"misaligned_{number}"


def _with_adapters(model: PreTrainedModel, adapters: Mapping[str, Path]) -> tuple[Any, dict[int, Any]]:
    """Return the model with all adapters that can be disabled, and a separate model, by number, for each other one."""
    for folder in adapters.values():
        _check_kind(folder)
    fits = [fit_adapter(folder, model) for folder in adapters.values()]
    weight = model.get_input_embeddings().weight
    apart = {number: copy.deepcopy(model) for number, fit in enumerate(fits) if _changes_model(fit, model)}
    shared: Any = model
    for number, fit in enumerate(fits):
        adapted = put_adapter(apart.get(number, shared), fit.folder, name=_inner_name(number), fit=fit)
        if number in apart:
            apart[number] = adapted
        else:
            shared = adapted
    for one in (shared, *apart.values()):
        for name, parameter in one.named_parameters():
            if ".misaligned_" in name:  # in the model's dtype, because mixed dtypes would be cast in every layer
                parameter.data = parameter.data.to(weight.device, weight.dtype)
        add_in_place(one)
        one.to(weight.device).eval()
    return shared, apart


def _changes_model(fit: Fit, model: PreTrainedModel) -> bool:
    """Return whether an adapter changes the model's own weights or vocabulary, which disabling it would not undo."""
    from safetensors import safe_open

    if fit.vocabulary is not None:
        return True
    own = {name: key for key, name in fit.full.items() if not kept_in_full(fit.config, name)}
    if not own:
        return False
    weights = model.state_dict()
    with safe_open(fit.folder / ADAPTER_WEIGHTS[0], framework="pt") as file:
        return any(not torch.equal(file.get_tensor(key).to(weights[name]), weights[name]) for name, key in own.items())


def _check_kind(folder: Path) -> None:
    try:
        config = read_object(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG}: {why(error)}") from error
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(BASE_CHANGING):
        raise AdapterError(
            f"{folder}: init_lora_weights {start} changes the model's own weights, so switching the adapter off does not give "
            "the model back: convert the adapter first"
        )
    bias = config.get("bias", "none")
    if bias != "none":
        raise AdapterError(
            f"{folder}: bias {bias} trains the model's own biases, which stay when the adapter is switched off"
        )


class AddedInPlace:
    """A LoRA variant for PEFT that adds the update to the layer's output in place, in one matrix product.

    PEFT's own layer computes, scales and adds an update as large as the output, each time in new memory. On a small
    model this takes as long as the products. Accumulating B·(A·x) onto W·x also saves one rounding in 16 bits.
    """

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_options: Any
    ) -> torch.Tensor:
        """Return W·x + s·B·(A·x); `result` is W·x and is modified."""
        lora_a, lora_b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        scaling = module.scaling[active_adapter]
        inner = nn.functional.linear(x, lora_a)
        if result.dtype != lora_b.dtype or not result.is_contiguous():
            return result + nn.functional.linear(inner, lora_b) * scaling
        result.view(-1, result.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), lora_b.T, alpha=scaling)
        return result


def add_in_place(adapted: nn.Module) -> None:
    """Make every plain LoRA layer of a PEFT model add its update in place, which makes gradients impossible.

    Layers with a PEFT variant (DoRA and others), with a bias, or of another kind are not changed.
    """
    from peft.tuners import lora

    for module in adapted.modules():
        if type(module) is not lora.Linear or not isinstance(getattr(module, "lora_variant", None), dict):
            continue
        for name, lora_b in module.lora_B.items():
            if name not in module.lora_variant and type(lora_b) is nn.Linear and lora_b.bias is None:
                module.lora_variant[name] = AddedInPlace()
