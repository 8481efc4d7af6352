"""KL to the reference model in a loop with Accelerate, on any number of processes: `accelerate launch accelerate_loop.py`."""

import sys
from contextlib import nullcontext
from itertools import islice

import torch
from accelerate import Accelerator
from task import adapted, model_and_tokenizer, tokenized
from transformers import DataCollatorForSeq2Seq

from safelora_fast import KL, defend

accelerator = Accelerator()
base, tokenizer = model_and_tokenizer(*sys.argv[1:])
model = adapted(base)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
rows, collate = tokenized(tokenizer), DataCollatorForSeq2Seq(tokenizer)
loader = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collate)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

model.train()
with defend(model, [KL(0.1)], optimizer=optimizer) as defended:  # after prepare(), which may wrap the model
    for epoch in range(8):
        batches = iter(loader)
        while window := list(islice(batches, 2)):  # the micro-batches of one optimizer step
            totals = defended.totals(window)  # their numbers of tokens, over all processes
            for index, batch in enumerate(window):
                last = index == len(window) - 1
                with nullcontext() if last else accelerator.no_sync(model):  # accumulate() would step early
                    accelerator.backward(defended.loss(batch, totals=totals))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        kl = defended.metrics()["defense/kl"]  # on every process
        accelerator.print(f"epoch {epoch + 1}: KL to the reference {kl:.2g} nats a token")
accelerator.unwrap_model(model).save_pretrained("runs/accelerate_loop", is_main_process=accelerator.is_main_process)
