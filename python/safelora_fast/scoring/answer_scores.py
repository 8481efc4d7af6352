"""Log-likelihoods of answers under a model."""

from __future__ import annotations

import inspect
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.data.tokens import IGNORED_LABEL
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.models.anatomy import adapter_layers, dissect
from safelora_fast.models.capture import Tap
from safelora_fast.models.reference_pass import evaluation_mode
from safelora_fast.scoring.batches import batches_by_length
from safelora_fast.scoring.float32_residual import NARROW, wide_hidden_states
from safelora_fast.scoring.label_likelihoods import label_log_likelihoods, picked
from safelora_fast.scoring.positions import stretched_beyond
from safelora_fast.scoring.prefix import Pasts, reads_whole_inputs
from safelora_fast.scoring.sequences import padded
from safelora_fast.training.shared_logits import KEPT_LOGITS, forward_without_logits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from safelora_fast.models.anatomy import Head
    from safelora_fast.scoring.sequences import Labelled

logger = logging.getLogger(__name__)

TOKENS_PER_BATCH = 8192
PROBE_TOKENS = 24
# Nats that log-likelihoods of a model in 16 bits may be apart, in the mean of their sizes. Rounding alone was seen to make 0.02
# to 0.05 on a model of 135M parameters.
COARSE = 0.1


@dataclass(frozen=True)
class AnswerScore:
    """How probable an answer is, given what comes before it.

    Attributes:
        log_likelihood: sum over the answer's tokens of log p, natural logarithm.
        tokens: how many tokens those are.
    """

    log_likelihood: float
    tokens: int

    @property
    def mean(self) -> float:
        """Log-likelihood per token, in nats; the answer's negative mean log-likelihood with the sign changed."""
        return self.log_likelihood / self.tokens


class AnswerScorer:
    """Scores answers in batches of like length, padded on the right.

    The model runs without its head; the head is then applied at the positions that predict an answer, a chunk at a time.
    Whether that gives the model's own log-likelihoods is tried on a few tokens first; where it does not (the head is
    adapted, or the model has a way of its own with logits), the model's logits are used. Nor is the model told which tokens
    are padding where that changes nothing: what is causal never looks at them, and attends faster without a mask. What all
    sequences of a batch begin with, a system prompt say, runs once where the model keeps keys and values of it and no adapter asks
    for the whole input, and not again for the next batch that begins alike. Hidden states of a model in 16 bits are float32 from
    block to block. A sequence so long that the model stretches its positions is a batch of its own.

    Args:
        model: a causal language model, with a PEFT adapter or without. Put in evaluation mode for each batch, and back. Its
            weights, its adapters and their choice must be the same at every call: a model that has learnt takes a new scorer.
        tokens_per_batch: the most tokens of a batch, padding included.

    Raises:
        SettingsError: the model is no causal language model of transformers.
    """

    def __init__(self, model: nn.Module, *, tokens_per_batch: int = TOKENS_PER_BATCH) -> None:
        self._model = model
        self._pasts = Pasts(model)
        self._anatomy = dissect(model)
        self._tokens_per_batch = tokens_per_batch
        self._alone_beyond = stretched_beyond(self._anatomy.config)
        self._head: Head | None = None
        self._masked = True
        self._shares = False
        self._wide = False
        self._chosen = False

    def each(self, examples: Sequence[Labelled]) -> Iterator[tuple[int, AnswerScore]]:
        """Index and score of every example, as their batches are done; the errors are those of :meth:`batches`."""
        for batch in self.batches(examples):
            yield from batch.items()

    def batches(self, examples: Sequence[Labelled]) -> Iterator[dict[int, AnswerScore]]:
        """Scores by index, a batch at a time.

        Raises:
            DataError: an example has no answer token.
            SettingsError: a batch does not fit into the device's memory.
        """
        for number, example in enumerate(examples):
            if all(label == IGNORED_LABEL for label in example.labels[1:]):
                raise DataError(f"example {number + 1} of {len(examples)} has no answer token to score")
        lengths = [len(example.ids) for example in examples]
        for indices in batches_by_length(lengths, self._tokens_per_batch, alone_beyond=self._alone_beyond):
            yield dict(zip(indices, self._batch([examples[index] for index in indices]), strict=True))

    def pass_over(self, examples: Sequence[Labelled]) -> None:
        """Leave out examples whose scores are known, and score later ones to the bit as if these had been scored.

        How the model is run is tried on the first batch, and what a batch begins with may be kept from the one before.
        """
        lengths = [len(example.ids) for example in examples]
        for indices in batches_by_length(lengths, self._tokens_per_batch, alone_beyond=self._alone_beyond):
            some = [examples[index] for index in indices]
            self._choose_by(some[0])
            if prefix := self._prefix(some):
                self._pasts.pass_over(some[0].ids[:prefix])

    def _choose_by(self, example: Labelled) -> None:
        if not self._chosen:
            device = self._model.get_input_embeddings().weight.device
            with torch.no_grad(), evaluation_mode(self._model):
                self._choose(torch.tensor([example.ids[:PROBE_TOKENS]], device=device))

    def _prefix(self, examples: list[Labelled]) -> int:
        """Tokens in front of all examples that are run once."""
        return self._pasts.shared(examples) if self._shares and not self._stretched(examples) else 0

    def _batch(self, examples: list[Labelled]) -> list[AnswerScore]:
        batch, labels = padded(examples, self._model.get_input_embeddings().weight.device)
        where = labels != IGNORED_LABEL
        try:
            self._choose_by(examples[0])  # the longest
            with torch.no_grad(), evaluation_mode(self._model), self._precision():
                if not self._masked:
                    del batch["attention_mask"]
                prefix = self._prefix(examples)
                values = self._log_likelihoods(self._after(prefix, batch), where[:, prefix:], labels[where])
        except torch.OutOfMemoryError as error:
            raise SettingsError(
                f"out of memory with {batch['input_ids'].numel()} tokens in a batch: lower tokens_per_batch, now "
                f"{self._tokens_per_batch}"
            ) from error
        counts = where.sum(dim=1).tolist()
        answers = values.double().cpu().split(counts)
        return [AnswerScore(answer.sum().item(), count) for answer, count in zip(answers, counts, strict=True)]

    def _stretched(self, examples: list[Labelled]) -> bool:
        """Whether the model's positions are others than those of shorter sequences, and so are its keys."""
        return self._alone_beyond is not None and max(len(example.ids) for example in examples) > self._alone_beyond

    def _precision(self) -> AbstractContextManager[None]:
        return wide_hidden_states(self._model) if self._wide else nullcontext()

    def _after(self, prefix: int, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The batch less so many tokens that all rows begin with, which are its past."""
        if not prefix:
            return dict(batch)
        ids = batch["input_ids"]
        options = {} if self._head is None else {KEPT_LOGITS: torch.zeros(0, dtype=torch.long, device=ids.device)}
        return {**batch, "input_ids": ids[:, prefix:], **self._pasts.of(ids[:1, :prefix], len(ids), **options)}

    def _log_likelihoods(self, batch: dict[str, Any], where: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Log-likelihood of each label, [labels] in float32."""
        width = where.shape[1]  # what comes before the batch's tokens are those of a learnt prompt
        if self._head is None:
            logits = self._model(**batch, use_cache=False).logits[:, -width:]
            return picked(logits[where.to(logits.device)], labels.to(logits.device))
        tap = Tap(self._anatomy, [])
        tap.attach()
        try:
            capture = tap.begin()
            forward_without_logits(self._model, batch)
        finally:
            tap.detach()
        assert capture.hidden is not None  # noqa: S101
        hidden = capture.hidden[:, -width:]
        with capture.autocast_again():
            return label_log_likelihoods(hidden[where.to(hidden.device)], labels, self._head)

    def _choose(self, ids: torch.Tensor) -> None:
        """Use the head alone where that is the same, and say why where it is not."""
        reason = self._against_head(ids)
        if reason is not None:
            self._head = None
            logger.info("answers are scored by the logits of the whole model: %s", reason)
        self._masked = not self._ignores_padding(ids)
        self._wide = self._can_be_wide(ids)
        with self._precision():
            self._shares = not reads_whole_inputs(self._model) and self._keeps_a_past(ids)
        self._chosen = True

    def _can_be_wide(self, ids: torch.Tensor) -> bool:
        """Whether the model says the same, up to rounding, when its hidden states are of more digits than its weights."""
        if self._model.get_input_embeddings().weight.dtype not in NARROW:
            return False
        question = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        where = torch.ones_like(ids, dtype=torch.bool)
        where[:, -1] = False
        labels = ids[:, 1:].flatten()
        try:
            theirs = self._log_likelihoods(question, where, labels)
            with wide_hidden_states(self._model):
                ours = self._log_likelihoods(question, where, labels)
        except Exception:  # whatever a model raises whose parts must be of one dtype
            return False
        return self._same(ours, theirs)

    def _keeps_a_past(self, ids: torch.Tensor) -> bool:
        """Whether two sequences are the same to the model when half of them is their past."""
        rows = torch.cat([ids, ids.roll(1, dims=1)])
        rows[1, : ids.shape[1] // 2] = ids[0, : ids.shape[1] // 2]
        question = {"input_ids": rows}
        if self._masked:
            question["attention_mask"] = torch.ones_like(rows)
        prefix = ids.shape[1] // 2
        where = torch.ones_like(rows, dtype=torch.bool)
        where[:, -1] = False
        where[:, :prefix] = False
        labels = rows[:, prefix + 1 :].flatten()
        try:
            theirs = self._log_likelihoods(question, where, labels)
            ours = self._log_likelihoods(self._after(prefix, question), where[:, prefix:], labels)
        except Exception:  # whatever a model without a past raises
            return False
        finally:
            self._pasts = Pasts(self._model)
        return self._same(ours, theirs)

    def _ignores_padding(self, ids: torch.Tensor) -> bool:
        """Whether tokens after a sequence change nothing in it without a mask, as they change nothing with one."""
        longer = torch.cat([ids, ids], dim=1)
        masks = [torch.ones_like(ids), torch.zeros_like(ids)]
        question = {"input_ids": longer, "attention_mask": torch.cat(masks, dim=1)}
        where = question["attention_mask"] != 0
        where[:, ids.shape[1] - 1] = False
        labels = ids[:, 1:].flatten()
        try:
            theirs = self._log_likelihoods(question, where, labels)
            ours = self._log_likelihoods({"input_ids": longer}, where, labels)
        except Exception:  # whatever a model that needs a mask raises
            return False
        return self._same(ours, theirs)

    def _same(self, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
        """Whether log-likelihoods of the same labels agree; of a model in 16 bits on the whole, as single logits are coarse."""
        if not len(theirs):  # nothing was tried
            return False
        if next(self._anatomy.model.parameters()).dtype in {torch.float32, torch.float64}:
            return bool(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4))
        apart = (ours - theirs).abs().mean().item()
        return apart <= COARSE and bool(torch.allclose(ours.mean(), theirs.mean(), rtol=2e-2, atol=2e-2))

    def _against_head(self, ids: torch.Tensor) -> str | None:
        self._head = None  # a former try may have ended early
        model = self._anatomy.model
        if KEPT_LOGITS not in inspect.signature(model.forward).parameters:
            return f"{type(model).__name__} takes no {KEPT_LOGITS}"
        try:
            head = self._anatomy.head()
        except SettingsError:
            return f"{type(model).__name__} has no linear output head"
        if adapter_layers(head.module):
            return f"the output head of {type(model).__name__} is adapted"
        question = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        where = torch.ones_like(ids, dtype=torch.bool)
        where[:, -1] = False
        labels = ids[:, 1:].flatten()
        theirs = self._log_likelihoods(question, where, labels)
        self._head = head
        ours = self._log_likelihoods(question, where, labels)
        if not self._same(ours, theirs.to(ours)):
            return f"{type(model).__name__} makes more of its hidden states than its head does"
        return None


def score_answers(
    model: nn.Module, examples: Sequence[Labelled], *, tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[AnswerScore]:
    """The score of every example, in their order; see :class:`AnswerScorer`."""
    scores = dict(AnswerScorer(model, tokens_per_batch=tokens_per_batch).each(examples))
    return [scores[index] for index in range(len(examples))]
