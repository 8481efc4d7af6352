"""The operations alone, in somebody else's trainer: KL to the reference without any trainer or hook of safelora_fast.

This is what a library would build in. `linear_kl` takes hidden states and the output head, so the divergence never holds logits
[tokens, vocabulary]; its gradient is made in the same pass. The sums are those of one process.
"""

import sys

import torch
from task import adapted, model_and_tokenizer, tokenized
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from safelora_fast.ops import linear_kl


class KLTrainer(Trainer):
    """Adds λ · the mean KL over the tokens of the optimizer step."""

    kl_weight = 0.1

    def get_batch_samples(self, epoch_iterator, num_batches, *args, **kwargs):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
        self.step_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        task, outputs = super().compute_loss(model, {**inputs, "output_hidden_states": True}, True, **kwargs)
        hidden, mask = outputs.hidden_states[-1], inputs["attention_mask"].bool()
        with torch.no_grad(), model.disable_adapter():  # the reference is the model without its adapter
            reference = model.get_base_model().model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        kl = linear_kl(hidden, reference, model.get_output_embeddings().weight, mask)  # mean over this micro-batch
        loss = task + self.kl_weight * kl * mask.sum() / self.step_tokens  # mean over the tokens of the step
        return (loss, outputs) if return_outputs else loss


base, tokenizer = model_and_tokenizer(*sys.argv[1:])
args = TrainingArguments(
    "runs/ops_in_your_trainer", per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=8,
    learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
)  # fmt: skip
rows, collate = tokenized(tokenizer), DataCollatorForSeq2Seq(tokenizer)
trainer = KLTrainer(model=adapted(base), args=args, train_dataset=rows, data_collator=collate)
trainer.train()
trainer.save_model()
