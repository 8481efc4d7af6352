"""KL to the reference model in TRL's SFTTrainer, which reads conversations: one more argument."""

import sys

import torch
from datasets import Dataset
from task import adapted, conversations, model_and_tokenizer
from trl import SFTConfig

from safelora_fast import KL, DefendedSFTTrainer

base, tokenizer = model_and_tokenizer(*sys.argv[1:])
trainer = DefendedSFTTrainer(
    model=adapted(base),  # or the model, and peft_config
    args=SFTConfig(
        output_dir="runs/trl_sft",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    ),
    train_dataset=Dataset.from_list(conversations()),
    processing_class=tokenizer,
    defenses=[KL(0.1)],
)
trainer.train()
trainer.save_model()  # the adapter, and a model card that names the defenses
