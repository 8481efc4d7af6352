"""Scores of completions under a model: log-likelihoods, misalignment margin, drift, and confidence intervals."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safelora_fast.scoring.answer_scores import AnswerScore, AnswerScorer, score_answers
    from safelora_fast.scoring.sequences import Labelled, batches_by_length

__all__ = ["AnswerScore", "AnswerScorer", "Labelled", "batches_by_length", "score_answers"]


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that intervals work without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "sequences" if name in {"Labelled", "batches_by_length"} else "answer_scores"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
