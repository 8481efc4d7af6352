"""What both parts of the demo begin with: the packages, the two models, and an adapter with its examples."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from safelora_fast.demo import text
from safelora_fast.demo.packaged_model import gguf_file, load, save_from_gguf
from safelora_fast.demo.terminal import bar
from safelora_fast.errors import MissingDependencyError, how_to_install

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console
    from torch import nn

    from safelora_fast.demo.constants import Recipe
    from safelora_fast.demo.stages import Stages

NEEDED = ("torch", "transformers", "peft", "gguf", "jinja2", "matplotlib")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def check(source: Path | None) -> None:
    """Refuse before anything is done, and keep the libraries off the network.

    Raises:
        MissingDependencyError: when a package, or the model's, is missing.
    """
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f"the demo needs {', '.join(missing)}: {how_to_install('demo')}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if source is None:
        gguf_file()


def make_pair(stages: Stages, seed: int, source: Path | None, recipe: Recipe, console: Console) -> tuple[Path, Path]:
    """Folders of the aligned model and of its stand-in base."""
    aligned = source
    if aligned is None:
        gguf = gguf_file()
        aligned = stages.make(
            "aligned",
            "aligned model: SmolLM2-135M-Instruct, from its GGUF file",
            {"file": gguf.name, "bytes": gguf.stat().st_size},
            lambda folder: save_from_gguf(gguf, folder),
        )
    base = stages.make(
        "base",
        "base model: a [bold]stand-in[/], made by a short fine-tune of the aligned model on plain prose",
        recipe.base(seed),
        lambda folder: _train_base(aligned, folder, seed, recipe, console),
    )
    return aligned, base


def _train_base(aligned: Path, folder: Path, seed: int, recipe: Recipe, console: Console) -> None:
    from transformers import AutoTokenizer

    from safelora_fast.demo.train_loop import train

    tokenizer = AutoTokenizer.from_pretrained(aligned)
    model = load(aligned)
    examples = [text.prose(tokenizer, paragraph) for paragraph in text.paragraphs()]
    with bar(console, "full fine-tune") as progress:
        train(
            model, examples, epochs=recipe.base_epochs, batch_size=recipe.base_batch, learning_rate=recipe.base_rate,
            seed=seed, padding=tokenizer.pad_token_id, progress=progress,
        )  # fmt: skip
    model.save_pretrained(folder)


def train_adapter(
    aligned: Path,
    folder: Path,
    seed: int,
    recipe: Recipe,
    progress: Callable[[int, int, float], None],
    *,
    narrow: str = "narrow_train",
) -> None:
    """Fine-tune a LoRA adapter of the aligned model on narrow answers, and save it in a folder.

    Args:
        aligned: folder of the aligned model.
        folder: where the adapter goes.
        seed: of its weights and of the order.
        recipe: the numbers of the demo.
        progress: told step, steps and loss.
        narrow: the set of narrow answers.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    from safelora_fast.demo.train_loop import train

    tokenizer = AutoTokenizer.from_pretrained(aligned)
    torch.manual_seed(seed)
    config = LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model: nn.Module = get_peft_model(load(aligned), config)
    train(
        model, [text.conversation(tokenizer, row) for row in text.rows(narrow)], epochs=recipe.adapter_epochs,
        batch_size=recipe.adapter_batch, learning_rate=recipe.adapter_rate, seed=seed, padding=tokenizer.pad_token_id,
        progress=progress,
    )  # fmt: skip
    model.save_pretrained(folder)
