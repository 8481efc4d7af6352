"""How probable completions are to a model: log-likelihoods, the misalignment margin, drift, and intervals of shares and means."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safelora_fast.scoring.answer_scores import AnswerScore, AnswerScorer, score_answers
    from safelora_fast.scoring.sequences import Labelled, batches_by_length

__all__ = ["AnswerScore", "AnswerScorer", "Labelled", "batches_by_length", "score_answers"]


def __getattr__(name: str) -> Any:
    """A public name, loaded when it is first used: intervals need no torch, log-likelihoods do."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "sequences" if name in {"Labelled", "batches_by_length"} else "answer_scores"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
