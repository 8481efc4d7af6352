"""Defenses in TRL's trainer for supervised fine-tuning."""

from __future__ import annotations

from trl import SFTTrainer

from safelora_fast.trainers.transformers import DefendedMixin


class DefendedSFTTrainer(DefendedMixin, SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer with defenses; see :class:`~safelora_fast.trainers.transformers.DefendedMixin`.

    ```python
    trainer = DefendedSFTTrainer(
        model, args=args, train_dataset=data, peft_config=peft_config, defenses=[KL(0.1)]
    )
    trainer.train()
    ```

    TRL's fused head builds no logits, and the defenses use hidden states. In packed rows each document is a sequence.
    """
