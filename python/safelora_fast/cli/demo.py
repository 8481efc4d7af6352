"""`safelora-fast demo`: fine-tune a real 135M model and project its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for all files of the demo.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Seed of every fine-tune.")] = 0,
    train: Annotated[
        bool, typer.Option("--train", metavar="", help="Compare the defenses that act during fine-tuning.")
    ] = False,
) -> None:
    """Fine-tune a real 135M model on narrow data, project the adapter, and show what the projection prevents and costs.

    Takes a few minutes on two cores. --train runs `safelora-fast compare` on ten fine-tunes, which takes half an hour or
    more. A second run reuses what the first one finished.
    """
    if not train:
        from safelora_fast.demo.pipeline import run

        run(output, seed=seed)
        return
    from safelora_fast.cli.compare import run_and_show
    from safelora_fast.configuration import signatures
    from safelora_fast.demo.ingredients import check_packages, configure

    check_packages()
    signatures.check_packages("demo --train")
    config, _ = configure("compare.yaml", output, seed=seed)
    run_and_show(config)
