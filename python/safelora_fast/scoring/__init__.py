"""How probable completions are to a model: log-likelihoods, the misalignment margin, drift, and intervals of shares and means."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safelora_fast.scoring.answer_scores import AnswerScore, AnswerScorer, score_answers
    from safelora_fast.scoring.batches import batches_by_length
    from safelora_fast.scoring.sequences import Labelled

__all__ = ["AnswerScore", "AnswerScorer", "Labelled", "batches_by_length", "score_answers"]
_HOMES = {
    "AnswerScore": "answer_scores",
    "AnswerScorer": "answer_scores",
    "Labelled": "sequences",
    "batches_by_length": "batches",
    "score_answers": "answer_scores",
}


def __getattr__(name: str) -> Any:
    """A public name, loaded when it is first used: intervals need no torch, log-likelihoods do."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
