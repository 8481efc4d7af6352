"""KL to the reference model in a plain PyTorch loop: `defended.loss()` replaces `model(**batch).loss`."""

import sys

import torch
from task import adapted, model_and_tokenizer, tokenized
from transformers import DataCollatorForSeq2Seq

from safelora_fast import KL, defend

base, tokenizer = model_and_tokenizer(*sys.argv[1:])
model = adapted(base)
rows, collate = tokenized(tokenizer), DataCollatorForSeq2Seq(tokenizer)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)

model.train()
with defend(model, [KL(0.1)], optimizer=optimizer) as defended:
    for step in range(8):
        window = [collate(rows[:4]), collate(rows[4:])]  # the micro-batches of one optimizer step
        totals = defended.totals(window)  # their numbers of tokens: what the losses are divided by
        for batch in window:
            defended.loss(batch, totals=totals).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: KL to the reference {defended.metrics()['defense/kl']:.2g} nats a token")
model.save_pretrained("runs/plain_loop")
