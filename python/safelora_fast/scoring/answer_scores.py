"""Computing log-likelihoods of completions under a model."""

from __future__ import annotations

import inspect
import logging
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.data.tokens import IGNORED_LABEL
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.models.anatomy import adapter_layers, dissect
from safelora_fast.models.reference_pass import evaluation_mode
from safelora_fast.scoring.label_likelihoods import NARROW, label_log_likelihoods, picked
from safelora_fast.scoring.prefix import Pasts, reads_whole_inputs
from safelora_fast.scoring.sequences import batches_by_length, padded, stretched_beyond
from safelora_fast.training.shared_logits import KEPT_LOGITS, hidden_states

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import nn
    from transformers import PreTrainedModel

    from safelora_fast.models.anatomy import Head
    from safelora_fast.scoring.sequences import Labelled

logger = logging.getLogger(__name__)

TOKENS_PER_BATCH = 8192
PROBE_TOKENS = 24
# Tolerance for 16-bit models: mean absolute difference of log-likelihoods, in nats. On a model of 135M parameters,
# rounding alone caused 0.02 to 0.05.
COARSE = 0.1


@dataclass(frozen=True)
class AnswerScore:
    """Log-likelihood of a completion given its prompt.

    Attributes:
        log_likelihood: sum of log p over the completion's tokens, natural logarithm.
        tokens: number of tokens in the completion.
    """

    log_likelihood: float
    tokens: int

    @property
    def mean(self) -> float:
        """Mean log-likelihood per token, in nats."""
        return self.log_likelihood / self.tokens


class AnswerScorer:
    """Scores completions in batches of similar length, padded on the right.

    It probes the model with a few tokens and uses each shortcut that does not change the log-likelihoods:

    - The model runs without its head. The head is applied in chunks, only at positions that predict a completion. This
      is not done if the head is adapted or the model processes its logits further.
    - The attention mask is omitted: causal attention never reaches padding on the right, and is faster without a mask.
    - A prefix shared by all sequences of a batch, such as a system prompt, runs once, and is reused if the next batch
      starts with it. This is not done if an adapter needs the whole input.
    - The hidden states of a 16-bit model stay in float32 between layers.

    A sequence so long that the model rescales its positions is scored in its own batch.

    Args:
        model: a causal language model, with or without a PEFT adapter. It runs in evaluation mode, and its mode is
            restored after each batch. Weights and active adapters must not change: after a training step, create a new
            scorer.
        tokens_per_batch: maximum number of tokens in a batch, padding included.

    Raises:
        SettingsError: the model is not a transformers causal language model.
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
        """Yield (index, score) of every example as batches finish; errors as for :meth:`batches`."""
        for batch in self.batches(examples):
            yield from batch.items()

    def batches(self, examples: Sequence[Labelled]) -> Iterator[dict[int, AnswerScore]]:
        """Yield scores by index, one batch at a time.

        Raises:
            DataError: an example has no completion token.
            SettingsError: a batch does not fit in the device's memory.
        """
        for number, example in enumerate(examples):
            if all(label == IGNORED_LABEL for label in example.labels[1:]):
                raise DataError(f"example {number + 1} of {len(examples)} has no completion token to score")
        for indices in self._indices(examples):
            yield dict(zip(indices, self._batch([examples[index] for index in indices]), strict=True))

    def pass_over(self, examples: Sequence[Labelled]) -> None:
        """Skip examples with known scores, so that later scores are bit-identical to a run that scored them.

        Skipped batches matter: the first batch determines the shortcuts, and a batch may reuse the previous prefix.
        """
        for indices in self._indices(examples):
            some = [examples[index] for index in indices]
            self._choose_by(some[0])
            if prefix := self._prefix(some):
                self._pasts.pass_over(some[0].ids[:prefix])

    def _indices(self, examples: Sequence[Labelled]) -> list[list[int]]:
        lengths = [len(example.ids) for example in examples]
        return batches_by_length(lengths, self._tokens_per_batch, alone_beyond=self._alone_beyond)

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
        completions = values.double().cpu().split(counts)
        return [AnswerScore(part.sum().item(), count) for part, count in zip(completions, counts, strict=True)]

    def _prefix(self, examples: list[Labelled]) -> int:
        """Return the length of the shared prefix to run once; 0 if rescaled positions would change its keys."""
        longest = max(len(example.ids) for example in examples)
        stretched = self._alone_beyond is not None and longest > self._alone_beyond
        return self._pasts.shared(examples) if self._shares and not stretched else 0

    def _precision(self) -> AbstractContextManager[None]:
        return float32_residual(self._model) if self._wide else nullcontext()

    def _after(self, prefix: int, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return the batch without its first `prefix` tokens, which become cached keys and values."""
        if not prefix:
            return dict(batch)
        ids = batch["input_ids"]
        options = {} if self._head is None else {KEPT_LOGITS: torch.zeros(0, dtype=torch.long, device=ids.device)}
        return {**batch, "input_ids": ids[:, prefix:], **self._pasts.of(ids[:1, :prefix], len(ids), **options)}

    def _log_likelihoods(self, batch: dict[str, Any], where: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the log-likelihood of each label, [labels] in float32."""
        width = where.shape[1]  # a learned prompt precedes the batch's tokens
        if self._head is None:
            logits = self._model(**batch, use_cache=False).logits[:, -width:]
            return picked(logits[where.to(logits.device)], labels.to(logits.device))
        capture, hidden = hidden_states(self._model, self._anatomy, batch)
        hidden = hidden[:, -width:]
        with capture.autocast_again():
            return label_log_likelihoods(hidden[where.to(hidden.device)], labels, self._head)

    # The probes for shortcuts run on the first tokens of the first batch.

    def _choose_by(self, example: Labelled) -> None:
        if self._chosen:
            return
        ids = torch.tensor([example.ids[:PROBE_TOKENS]], device=self._model.get_input_embeddings().weight.device)
        with torch.no_grad(), evaluation_mode(self._model):
            reason = self._why_no_head(ids)
            if reason is not None:
                self._head = None
                logger.info("completions are scored by the logits of the whole model: %s", reason)
            self._masked = not self._ignores_padding(ids)
            self._wide = self._can_be_wide(ids)
            with self._precision():
                self._shares = not reads_whole_inputs(self._model) and self._keeps_a_past(ids)
        self._chosen = True

    def _why_no_head(self, ids: torch.Tensor) -> str | None:
        """Set `_head`; return why its log-likelihoods differ from the model's, or None if they agree."""
        self._head = None  # an earlier probe may have been interrupted
        model = self._anatomy.model
        kind = type(model).__name__
        if KEPT_LOGITS not in inspect.signature(model.forward).parameters:
            return f"{kind} takes no {KEPT_LOGITS}"
        try:
            head = self._anatomy.head()
        except SettingsError:
            return f"{kind} has no linear output head"
        if adapter_layers(head.module):
            return f"the output head of {kind} is adapted"
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        theirs = self._probe(batch, slice(0, -1))
        self._head = head
        ours = self._probe(batch, slice(0, -1))
        same = self._same(ours, theirs.to(ours))
        return None if same else f"{kind} makes more of its hidden states than its head does"

    def _ignores_padding(self, ids: torch.Tensor) -> bool:
        """Return whether padding on the right has no effect without a mask."""
        longer = torch.cat([ids, ids], dim=1)
        mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], dim=1)
        places = slice(0, ids.shape[1] - 1)
        try:
            theirs = self._probe({"input_ids": longer, "attention_mask": mask}, places)
            return self._same(self._probe({"input_ids": longer}, places), theirs)
        except Exception:  # a model that needs a mask may raise any exception
            return False

    def _can_be_wide(self, ids: torch.Tensor) -> bool:
        """Return whether float32 hidden states change the model's log-likelihoods by rounding only."""
        if self._model.get_input_embeddings().weight.dtype not in NARROW:
            return False
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        try:
            theirs = self._probe(batch, slice(0, -1))
            with float32_residual(self._model):
                return self._same(self._probe(batch, slice(0, -1)), theirs)
        except Exception:  # a model that requires one dtype may raise any exception
            return False

    def _keeps_a_past(self, ids: torch.Tensor) -> bool:
        """Return whether cached keys and values of the first half give the same log-likelihoods."""
        prefix = ids.shape[1] // 2
        rows = torch.cat([ids, ids.roll(1, dims=1)])
        rows[1, :prefix] = ids[0, :prefix]
        batch = {"input_ids": rows}
        if self._masked:
            batch["attention_mask"] = torch.ones_like(rows)
        try:
            theirs = self._probe(batch, slice(prefix, -1))
            return self._same(self._probe(batch, slice(prefix, -1), prefix=prefix), theirs)
        except Exception:  # a model without a cache may raise any exception
            return False
        finally:
            self._pasts = Pasts(self._model)

    def _probe(self, batch: dict[str, torch.Tensor], places: slice, *, prefix: int = 0) -> torch.Tensor:
        """Return log-likelihoods of the tokens after the given positions; the first `prefix` tokens are cached."""
        ids = batch["input_ids"]
        where = torch.zeros_like(ids, dtype=torch.bool)
        where[:, places] = True
        return self._log_likelihoods(self._after(prefix, batch), where[:, prefix:], ids.roll(-1, dims=1)[where])

    def _same(self, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
        """Return whether log-likelihoods agree; for 16-bit models on average, because single logits are coarse."""
        if not len(theirs):  # the probe had no tokens
            return False
        if next(self._anatomy.model.parameters()).dtype in {torch.float32, torch.float64}:
            return bool(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4))
        difference = (ours - theirs).abs().mean().item()
        return difference <= COARSE and bool(torch.allclose(ours.mean(), theirs.mean(), rtol=2e-2, atol=2e-2))


def score_answers(
    model: nn.Module, examples: Sequence[Labelled], *, tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[AnswerScore]:
    """Return the score of every example, in the same order; see :class:`AnswerScorer`."""
    scores = dict(AnswerScorer(model, tokens_per_batch=tokens_per_batch).each(examples))
    return [scores[index] for index in range(len(examples))]


@contextmanager
def float32_residual(model: PreTrainedModel) -> Iterator[None]:
    """Keep hidden states in float32 between 16-bit matrix products, so the residual sum is not rounded at every layer.

    Embeddings are converted to float32, and autocast rounds the inputs of products. A float32 model is not changed.
    """
    embeddings = model.get_input_embeddings()
    weight = embeddings.weight
    if weight.dtype not in NARROW:
        yield
        return
    handle = embeddings.register_forward_hook(lambda _module, _inputs, output: output.float())
    try:
        with torch.autocast(weight.device.type, dtype=weight.dtype):
            yield
    finally:
        handle.remove()
