"""The whole job on a real 135M model: fine-tune narrowly, project or defend, and measure what that prevents and costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["run"]


def run(output: Path, *, seed: int = 0) -> None:
    """Run the demo of the projection in a folder; a second run reuses what is finished there.

    Raises:
        MissingDependencyError: when torch, transformers, peft, gguf, matplotlib or the model package is missing.
        OutputError: when the folder cannot be written.
    """
    from safelora_fast.demo.pipeline import run as run_pipeline

    run_pipeline(output, seed=seed)
