"""KL to the reference model in the transformers Trainer: one more argument."""

import sys

from task import adapted, model_and_tokenizer, tokenized
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from safelora_fast import KL, DefendedTrainer

base, tokenizer = model_and_tokenizer(*sys.argv[1:])
trainer = DefendedTrainer(
    model=adapted(base),
    args=TrainingArguments(
        output_dir="runs/transformers_trainer",
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
    defenses=[KL(0.1)],
)
trainer.train()
trainer.save_model()  # the adapter, and a model card that names the defenses
