"""A plain training loop for the demo's fine-tunes, and the loss that judges them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from safelora_fast.demo.text import Example

IGNORED = -100


def batches(examples: Sequence[Example], size: int, padding: int) -> Iterator[dict[str, torch.Tensor]]:
    """Padded batches in the order given; labels cover what counts in the loss."""
    for first in range(0, len(examples), size):
        chunk = examples[first : first + size]
        longest = max(len(example.ids) for example in chunk)
        ids = torch.full((len(chunk), longest), padding)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORED)
        for row, example in enumerate(chunk):
            tokens = torch.tensor(example.ids)
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
            labels[row, example.start : len(tokens)] = tokens[example.start :]
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(
    model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    padding: int,
    progress: Callable[[int, int, float], None],
) -> None:
    """AdamW with a linear schedule and bfloat16 autocast, over seeded shuffles; `progress(step, steps, loss)` after each."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    steps = epochs * -(-len(examples) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    step = 0
    for _ in range(epochs):
        shuffled = [examples[index] for index in torch.randperm(len(examples), generator=order).tolist()]
        for batch in batches(shuffled, batch_size, padding):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            progress(step, steps, loss.item())
    model.eval()


def mean_loss(model: torch.nn.Module, examples: Sequence[Example], padding: int) -> float:
    """Mean negative log-likelihood, in nats, of the tokens that count."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches(examples, 8, padding):
        labels = batch["labels"][:, 1:]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        total += losses.item()
        tokens += int((labels != IGNORED).sum())
    return total / tokens
