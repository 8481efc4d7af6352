"""The demo's fine-tunes, with a plain training loop: the stand-in base model, and adapters on narrow examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_fast.data.chat import chat_of
from safelora_fast.demo import text
from safelora_fast.demo.packaged_model import load
from safelora_fast.files.progress import ProgressBar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class FineTune:
    """Settings of a fine-tune; `rank` is used for LoRA only."""

    epochs: int
    batch_size: int
    learning_rate: float
    rank: int | None = None


@dataclass(frozen=True)
class Example:
    """Token ids of one sequence; the loss covers those from `start` on."""

    ids: list[int]
    start: int


def conversation(tokenizer: PreTrainedTokenizerBase, row: text.Row) -> Example:
    """Encode an example with the model's chat template; the loss covers the completion and its end token."""
    start = chat_of(tokenizer).prompt([{"role": "user", "content": row.prompt}])
    answer = tokenizer(row.completion + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return Example([*start, *answer], len(start))


def train_base(aligned: Path, folder: Path, settings: FineTune, seed: int) -> None:
    """Fully fine-tune the aligned model on plain prose and save it, as a stand-in for the base model."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(aligned), load(aligned)
    ids = [tokenizer(one + tokenizer.eos_token, add_special_tokens=False)["input_ids"] for one in text.paragraphs()]
    _train(model, [Example(one, 1) for one in ids], settings, seed, tokenizer.pad_token_id, "full fine-tune")
    model.save_pretrained(folder)


def train_adapter(aligned: Path, folder: Path, settings: FineTune, seed: int, rows: str = "narrow_train") -> None:
    """Train a LoRA adapter of the aligned model on a narrow set, and save it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(aligned)
    torch.manual_seed(seed)
    assert settings.rank is not None  # noqa: S101
    config = LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(load(aligned), config)
    examples = [conversation(tokenizer, row) for row in text.rows(rows)]
    _train(model, examples, settings, seed, tokenizer.pad_token_id, "LoRA fine-tune")
    model.save_pretrained(folder)


def batches(examples: Sequence[Example], size: int, padding: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield padded batches, [batch, longest sequence], in the given order; labels are -100 outside the loss."""
    import torch

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


def _train(
    model: torch.nn.Module, examples: Sequence[Example], settings: FineTune, seed: int, padding: int, title: str
) -> None:
    """Train with AdamW, a linear schedule, bfloat16 autocast and seeded shuffles."""
    import torch

    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    steps = settings.epochs * -(-len(examples) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    step = 0
    with ProgressBar() as progress:
        progress.start(title, steps)
        for _ in range(settings.epochs):
            shuffled = [examples[index] for index in torch.randperm(len(examples), generator=order).tolist()]
            for batch in batches(shuffled, settings.batch_size, padding):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(**batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                step += 1
                progress.annotate(f"loss {loss.item():.3f}")
                progress.advance(step)
    model.eval()
