"""How probable given answers are to a model: what the margin and the selection of rows by perplexity measure."""

from safelora_fast.scoring.answer_scores import AnswerScore, AnswerScorer, score_answers
from safelora_fast.scoring.batches import batches_by_length
from safelora_fast.scoring.sequences import Labelled

__all__ = ["AnswerScore", "AnswerScorer", "Labelled", "batches_by_length", "score_answers"]
