"""Measuring a model's drift from its reference: loss and divergence on completions, from float32 logits.

The measure uses no defense and no kernel, so it does not depend on the code that it evaluates. Logits are made from
hidden states for some tokens at a time: at most [chunk, vocabulary] is in memory, never those of a batch.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from safelora_fast.data.tokens import IGNORED_LABEL
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import adapter_layers, dissect
from safelora_fast.models.reference_pass import evaluation_mode
from safelora_fast.scoring.sequences import batches_by_length, padded
from safelora_fast.training.shared_logits import KEPT_LOGITS, hidden_states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from safelora_fast.models.anatomy import Head
    from safelora_fast.scoring.sequences import Labelled

TOKENS_PER_BATCH = 1024
CHUNK_ELEMENTS = 1 << 24  # logits in memory at a time, for each of the two models
PROBE_TOKENS = 16


@dataclass(frozen=True)
class AnswerDrift:
    """Sums over the tokens of one completion, end of turn included, in nats.

    Attributes:
        tokens: number of tokens.
        loss: negative log-likelihood.
        divergence: KL(model ‖ reference) over the whole vocabulary; 0 without a reference.
    """

    tokens: int
    loss: float
    divergence: float


class Predictor:
    """A model's log-probabilities at the positions that predict a completion.

    Hidden states are a thousandth of the logits, so those of a reference model are kept for the next run that is compared
    with it. If the model's logits are more than its head makes of hidden states (or the head is adapted), the logits
    themselves are kept instead, and nothing from one call to the next.

    Args:
        model: a causal language model, with or without an adapter.
        keep: keep the hidden states of each example; the weights must not change.
    """

    def __init__(self, model: nn.Module, *, keep: bool = False) -> None:
        self._model, self._keep = model, keep
        self._anatomy = dissect(model)
        self._head: Head | None = None
        self._probed = False
        self._kept: dict[tuple[int, ...], torch.Tensor] = {}

    def states(self, examples: Sequence[Labelled]) -> torch.Tensor:
        """Return what :meth:`log_probabilities` reads, [completion tokens, hidden or vocabulary]."""
        keys = [tuple(example.ids) for example in examples]
        if self._keep and all(key in self._kept for key in keys):
            return torch.cat([self._kept[key] for key in keys])
        batch, labels = padded(examples, next(self._model.parameters()).device)
        where = labels != IGNORED_LABEL
        with torch.no_grad(), evaluation_mode(self._model):
            if not self._probed:
                self._head, self._probed = self._linear_head(batch["input_ids"][:1, :PROBE_TOKENS]), True
            found = self._run(batch, where)
        if self._keep and self._head is not None:
            self._kept.update(zip(keys, found.split(where.sum(dim=1).tolist()), strict=True))
        return found

    def log_probabilities(self, states: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities [tokens, vocabulary] in float32."""
        if self._head is None:
            return states.float().log_softmax(-1)
        return _logits(states, self._head).log_softmax(-1)

    def _run(self, batch: dict[str, torch.Tensor], where: torch.Tensor) -> torch.Tensor:
        width = where.shape[1]  # a learned prompt precedes the batch's tokens
        if self._head is None:
            output: Any = self._model(**batch, use_cache=False)
            logits: torch.Tensor = output.logits[:, -width:]
            return logits[where.to(logits.device)]
        _, hidden = hidden_states(self._model, self._anatomy, batch)
        hidden = hidden[:, -width:]
        return hidden[where.to(hidden.device)]

    def _linear_head(self, ids: torch.Tensor) -> Head | None:
        """Return the output head if it makes the model's logits of hidden states, as a few tokens show; else None."""
        try:
            head = self._anatomy.head()
        except SettingsError:
            return None
        if KEPT_LOGITS not in inspect.signature(self._anatomy.model.forward).parameters or adapter_layers(head.module):
            return None
        where = torch.ones_like(ids, dtype=torch.bool)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        theirs = self._run(batch, where).float()
        self._head = head
        ours = _logits(self._run(batch, where), head)
        spread = float(theirs.std())  # NaN for a model that has diverged
        exact = spread >= 0 and torch.allclose(ours, theirs.to(ours), rtol=1e-2, atol=1e-2 * spread)
        return head if exact else None


def _logits(states: torch.Tensor, head: Head) -> torch.Tensor:
    weight, bias = head.parameters()
    logits = head.scale * linear(states.to(weight.device, weight.dtype), weight, bias).float()
    return logits if head.softcap is None else (logits / head.softcap).tanh() * head.softcap


def answer_drift(
    model: nn.Module,
    reference: nn.Module | Predictor | None,
    examples: Sequence[Labelled],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Callable[[int], None] | None = None,
) -> list[AnswerDrift]:
    """Compute the loss of every completion under a model, and the model's divergence from a reference model.

    Args:
        model: a causal language model, with or without an adapter.
        reference: the model before fine-tuning, on the same device; a :class:`Predictor` of it keeps its hidden states for
            the next call; None to compute only the loss.
        examples: prompts with completions.
        tokens_per_batch: maximum number of tokens in a batch, padding included.
        progress: called with the number of completions done so far.

    Raises:
        SettingsError: a batch does not fit in the device's memory, or the two models have different vocabularies.
    """
    own = Predictor(model)
    other = reference if reference is None or isinstance(reference, Predictor) else Predictor(reference)
    found: dict[int, AnswerDrift] = {}
    for indices in batches_by_length([len(example.ids) for example in examples], tokens_per_batch):
        try:
            found.update(zip(indices, _batch(own, other, [examples[index] for index in indices]), strict=True))
        except torch.OutOfMemoryError as error:
            raise SettingsError(f"out of memory with {tokens_per_batch} tokens in a batch: ask for fewer") from error
        if progress is not None:
            progress(len(found))
    return [found[index] for index in range(len(examples))]


def _batch(own: Predictor, other: Predictor | None, examples: list[Labelled]) -> list[AnswerDrift]:
    targets = [[label for label in example.labels[1:] if label != IGNORED_LABEL] for example in examples]
    sums = _Sums()
    with torch.no_grad():
        states, theirs = own.states(examples), None if other is None else other.states(examples)
        labels = torch.tensor([label for row in targets for label in row], device=states.device)
        for start, ours in _chunks(own, states):
            rows = slice(start, start + len(ours))
            sums.loss.append(-ours.gather(-1, labels[rows, None])[:, 0].double().cpu())
            if other is None or theirs is None:
                sums.divergence.append(torch.zeros(len(ours), dtype=torch.float64))
                continue
            before = other.log_probabilities(theirs[rows])
            if ours.shape != before.shape:
                raise SettingsError(
                    f"the model's vocabulary has {ours.shape[-1]} tokens and its reference's {before.shape[-1]}: "
                    "no divergence is defined"
                )
            sums.divergence.append((ours.exp() * ours.sub(before)).sum(dim=-1, dtype=torch.float64).cpu())
    counts = [len(row) for row in targets]
    parts = zip(counts, torch.cat(sums.loss).split(counts), torch.cat(sums.divergence).split(counts), strict=True)
    return [AnswerDrift(count, losses.sum().item(), drifted.sum().item()) for count, losses, drifted in parts]


@dataclass
class _Sums:
    loss: list[torch.Tensor] = field(default_factory=list)
    divergence: list[torch.Tensor] = field(default_factory=list)


def _chunks(predictor: Predictor, states: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row of each chunk, and its log-probabilities."""
    rows, start = 1, 0
    while start < len(states):
        found = predictor.log_probabilities(states[start : start + rows])
        yield start, found
        start += len(found)
        rows = max(CHUNK_ELEMENTS // found.shape[1], 1)
