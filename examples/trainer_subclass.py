"""Feature distance in a Trainer of your own that changes the loss: put `DefendedMixin` before it."""

import sys

import torch
from task import adapted, model_and_tokenizer, tokenized
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from safelora_fast import DefendedMixin, FeatureDistance


class ShyTrainer(Trainer):
    """Rewards entropy a little, so that no next token becomes certain."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        entropy = torch.distributions.Categorical(logits=outputs.logits[inputs["labels"] != -100]).entropy().mean()
        loss = loss - 0.01 * entropy / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class DefendedShyTrainer(DefendedMixin, ShyTrainer):
    """Adds the defenses to that loss, in training only, counted over all micro-batches of a step."""


base, tokenizer = model_and_tokenizer(*sys.argv[1:])
trainer = DefendedShyTrainer(
    model=adapted(base),
    args=TrainingArguments(
        output_dir="runs/trainer_subclass",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    ),
    train_dataset=tokenized(tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    defenses=[FeatureDistance(1.0, layers=2)],
)
trainer.train()
trainer.save_model()
