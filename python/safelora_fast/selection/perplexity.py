"""Mean negative log-likelihoods of answers: of a model, and of the same model with each of several adapters on it."""

from __future__ import annotations

import hashlib
import math
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import AdapterError, SettingsError
from safelora_fast.json_reading import read_object, why
from safelora_fast.posthoc.resolver import named_adapter
from safelora_fast.recipe.loading import LOADING_ERRORS, first_line
from safelora_fast.scoring import AnswerScorer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from safelora_fast.scoring import Labelled

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
INCOMPLETE = "Found missing adapter keys"
# These make new weights of the base model's when they are loaded: without the adapter it would not be the aligned model.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def read_adapters(given: Sequence[str | Path]) -> dict[str, Path]:
    """Adapters by name: of `NAME=ADAPTER` the name, of a folder or a Hub id its last part. Those of the Hub are fetched.

    Raises:
        AdapterError: a folder holds no adapter.
        SettingsError: none is given, or two have the same name.
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
    """SHA-256 of an adapter's weights and configuration.

    Raises:
        AdapterError: it has no weights, or they cannot be read.
    """
    digest = hashlib.sha256()
    weights = [adapter / name for name in WEIGHTS if (adapter / name).is_file()]
    if not weights:
        raise AdapterError(f"{adapter}: holds no {WEIGHTS[0]}")
    try:
        for file in (adapter / CONFIG, weights[0]):
            digest.update(file.read_bytes())
    except OSError as error:
        raise AdapterError(f"{adapter}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


class Perplexities:
    """Scores answers under the model alone (the aligned one) and under each adapter (the misaligned ones).

    Args:
        model: the aligned model; it is given the adapters, and loses them with :meth:`close`.
        adapters: folders by name.
        tokens_per_batch: the most tokens of a batch, padding included.

    Raises:
        AdapterError: an adapter does not fit the model.
    """

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, Path], *, tokens_per_batch: int) -> None:
        self.names = tuple(adapters)
        self._model = _with_adapters(model, adapters)
        self._scorers = [AnswerScorer(self._model, tokens_per_batch=tokens_per_batch) for _ in range(1 + len(adapters))]

    def of(self, examples: Sequence[Labelled], places: Sequence[str]) -> list[tuple[float, ...]]:
        """Mean negative log-likelihood of an answer token of each example: aligned first, then the adapters in order.

        Raises:
            AdapterError: one of them is NaN or infinite.
        """
        columns = []
        for number, scorer in enumerate(self._scorers):
            with self._acting(number):
                scores = dict(scorer.each(examples))
            columns.append([-scores[index].mean for index in range(len(examples))])
            for place, value in zip(places, columns[-1], strict=True):
                if not math.isfinite(value):
                    who = "the model" if number == 0 else f"adapter {self.names[number - 1]}"
                    raise AdapterError(f"{place}: under {who} its answer has a likelihood that is not finite")
        return list(zip(*columns, strict=True))

    def pass_over(self, examples: Sequence[Labelled]) -> None:
        """Leave out a batch that is known, so that the next one gets the bits that it would get after this one."""
        for number, scorer in enumerate(self._scorers):
            with self._acting(number):
                scorer.pass_over(examples)

    @contextmanager
    def _acting(self, number: int) -> Iterator[None]:
        if number == 0:
            with self._model.disable_adapter():
                yield
            return
        self._model.set_adapter(_inner(number - 1))
        yield

    def close(self) -> None:
        """Take the adapters off the model; learnt prompts are not in it."""
        if hasattr(self._model.base_model, "unload"):
            self._model.unload()


def _inner(number: int) -> str:
    """An adapter's name within PEFT, which takes no dots."""
    return f"misaligned_{number}"


def _with_adapters(model: PreTrainedModel, adapters: Mapping[str, Path]) -> Any:
    from peft import PeftModel
    from safetensors import SafetensorError

    from safelora_fast.selection.low_rank import add_in_place

    weight = model.get_input_embeddings().weight
    adapted: Any = None
    for number, folder in enumerate(adapters.values()):
        _check_kind(folder)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=INCOMPLETE)
                if adapted is None:
                    adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=_inner(number))
                else:
                    adapted.load_adapter(str(folder), adapter_name=_inner(number))
            _check_weights(adapted, _inner(number), folder)
        except UserWarning as error:
            raise AdapterError(
                f"{folder}: lacks weights for modules of this model: was it trained on another one?"
            ) from error
        except (*LOADING_ERRORS, TypeError, SafetensorError) as error:
            raise AdapterError(f"{folder}: the adapter cannot be put on the model: {first_line(error)}") from error
    for name, parameter in adapted.named_parameters():
        if ".misaligned_" in name:  # in the model's dtype: mixed ones would be cast back and forth in every layer
            parameter.data = parameter.data.to(weight.device, weight.dtype)
    add_in_place(adapted)
    return adapted.eval()


def _check_weights(adapted: Any, name: str, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    file = folder / WEIGHTS[0]
    if not file.is_file():
        return
    with safe_open(file, framework="np") as weights:
        extra = {key for key in weights.keys() if "lora_" in key}  # noqa: SIM118 - it is no mapping
    extra -= get_peft_model_state_dict(adapted, adapter_name=name).keys()
    if extra:
        raise AdapterError(
            f"{folder}: holds weights for modules that this model does not have, e.g. {min(extra)}: was it trained on another "
            "one?"
        )


def _check_kind(folder: Path) -> None:
    try:
        config = read_object(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG}: {why(error)}") from error
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGES_BASE):
        raise AdapterError(
            f"{folder}: init_lora_weights {start} changes the model's own weights, so that it cannot be had without the "
            "adapter: convert the adapter first"
        )
    bias = config.get("bias", "none")
    if bias != "none":
        raise AdapterError(
            f"{folder}: bias {bias} trains the model's own biases, which stay when the adapter is switched off"
        )
