"""Defences in TRL's trainer for supervised fine-tuning."""

from __future__ import annotations

from trl import SFTTrainer

from safelora_fast.trainers.transformers import DefendedMixin


class DefendedSFTTrainer(DefendedMixin, SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer with defences; see :class:`~safelora_fast.trainers.transformers.DefendedMixin`.

    TRL builds no logits: the defences work from hidden states. In packed rows each document is a sequence.
    """
