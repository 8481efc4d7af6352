"""`safelora-fast demo`: the whole job on a real 135M model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for everything that the demo makes.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Seed of every fine-tune.")] = 0,
    train: Annotated[
        bool, typer.Option("--train", metavar="", help="Compare the defences that act while a model is fine-tuned.")
    ] = False,
) -> None:
    """Fine-tune a real 135M model narrowly, project the adapter, and show what that prevents and costs.

    Takes a few minutes on two cores, and longer with --train: eight fine-tunes.
    A second run reuses what the first one finished.
    """
    from safelora_fast.demo import run, run_comparison

    (run_comparison if train else run)(output, seed=seed)
