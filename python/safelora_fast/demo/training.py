"""A plain training loop, the same for every fine-tune, defended or not, and the loss that judges them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from safelora_fast.data.schedule import Schedule
from safelora_fast.training import defend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from safelora_fast.defenses import Defense
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


@dataclass(frozen=True)
class Course:
    """How a training went, in seconds.

    Attributes:
        steps: of each step: forward, backward and the optimiser.
        end: what the defences did after the last step.
    """

    steps: list[float]
    end: float


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
    defenses: Sequence[Defense] = (),
    safe: Sequence[Example] = (),
    fraction: float = 0.0,
) -> Course:
    """AdamW with a linear schedule and bfloat16 autocast, over seeded shuffles; `progress(step, steps, loss)` after each.

    The order of the examples depends on the seed alone, not on the defences. In each epoch a fraction of the examples is
    added of safe ones, which go on from epoch to epoch.
    """
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    mixture = Schedule(fraction, seed)
    others = (safe[index] for index in mixture.orders(len(safe)))
    steps = epochs * -(-(len(examples) + mixture.due(len(examples))) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    model.train()
    seconds: list[float] = []
    with defend(model, defenses, optimizer=optimiser) as defended:
        for _ in range(epochs):
            rows = [example for _, example in mixture.weave([examples], others)]
            shuffled = [rows[index] for index in torch.randperm(len(rows), generator=order).tolist()]
            for batch in batches(shuffled, batch_size, padding):
                start = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = defended.loss(batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                schedule.step()
                optimiser.zero_grad()
                seconds.append(time.perf_counter() - start)
                progress(len(seconds), steps, loss.item())
        start = time.perf_counter()
    end = time.perf_counter() - start
    model.eval()
    return Course(seconds, end)


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
