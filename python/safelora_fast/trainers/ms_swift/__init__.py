"""Defenses in ms-swift's trainer for supervised fine-tuning; `plugin.py` says how to start it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from swift.trainers import Seq2SeqTrainer, TrainerFactory

from safelora_fast.data.interleave import SAFE
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.trainers.defense_settings import read_settings
from safelora_fast.trainers.transformers import DefendedMixin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safelora_fast.trainers.defense_settings import DefenseSettings

PLUGIN = str(Path(__file__).with_name("plugin.py"))
VARIABLE = "SAFELORA_FAST"  # of the environment: the file with the settings
CHANNEL = "channel"


class DefendedSwiftTrainer(DefendedMixin, Seq2SeqTrainer):  # type: ignore[misc]
    """ms-swift's trainer with defenses. Rows with `"channel": "safe"` are the safe examples.

    ms-swift cuts labels to the positions whose logits it computes (`use_logits_to_keep`); defenses see every token.
    Its loss is computed apart from KL's, because it has options of its own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_whole_sequences(self.template)
        self.data_collator = ChannelCollator(self.data_collator)
        self.use_defenses(**settings().arguments())


def check_whole_sequences(template: Any) -> None:
    """Raise SettingsError if ms-swift splits sequences over processes: units are counted over whole ones."""
    if template.sequence_parallel_size > 1:
        raise SettingsError(
            "sequence_parallel_size > 1 splits sequences in a way that defenses do not support: leave it at 1"
        )


@dataclass
class ChannelCollator:
    """A collator that adds `safe` to batches whose rows have a channel.

    Attributes:
        inner: ms-swift's collator.
    """

    inner: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Return the batch, with tags [batch], or [1, tokens] if documents are joined in one row.

        Raises:
            DataError: the row has another number of documents than of channels.
        """
        batch = self.inner(examples)
        if batch.get(CHANNEL) is not None:
            batch[SAFE] = _tags(batch[CHANNEL], batch)
        return batch


def _tags(channels: Sequence[str | None], batch: dict[str, Any]) -> torch.Tensor:
    safe = torch.tensor([channel == SAFE for channel in channels])
    rows = len(batch["input_ids"])
    positions = batch.get("position_ids")
    if rows > 1 or positions is None or batch.get("attention_mask") is not None:
        if rows != len(safe):
            raise DataError(f"{len(safe)} channels for {rows} rows")
        return safe
    documents = (positions.reshape(-1, positions.shape[-1])[:1] == 0).cumsum(dim=1) - 1
    if int(documents.max()) + 1 != len(safe):
        raise DataError(f"{len(safe)} channels for {int(documents.max()) + 1} documents in a row")
    return safe[documents]


def install() -> None:
    """Make ms-swift choose :class:`DefendedSwiftTrainer`, after a check of the settings.

    Raises:
        SettingsError: the settings are missing or invalid, or Megatron trains, which has no such trainer.
    """
    settings()
    if any(name.startswith("swift.megatron.") for name in sys.modules):
        raise SettingsError(
            f"{PLUGIN}: `megatron` trains without ms-swift's trainer, so no defense would run: use `swift sft`"
        )
    known = TrainerFactory.TRAINER_MAPPING
    known.update(dict.fromkeys(known, f"{__name__}.{refuse.__name__}"))
    known["causal_lm"] = f"{__name__}.{DefendedSwiftTrainer.__name__}"


def refuse(**_arguments: Any) -> NoReturn:
    """Stand in for the trainers of other tasks.

    Raises:
        SettingsError: always.
    """
    raise SettingsError(
        f"defenses are for `swift sft` and `swift pt` of a causal language model: remove {PLUGIN} from external_plugins"
    )


def settings() -> DefenseSettings:
    """Read the settings.

    Raises:
        SettingsError: the variable is not set, or the file is invalid.
    """
    if not os.environ.get(VARIABLE):
        raise SettingsError(f"{VARIABLE} is not set: let it name a YAML file with `defenses:`, as in a recipe")
    return read_settings(os.environ[VARIABLE])
