"""What a batch says about its tokens: which are real, predict a completion token or are of safe rows; where documents begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from safelora_fast.data.interleave import SAFE
from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

Tokens = Literal["all", "completion", "safe"]
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Spans:
    """The tokens of one micro-batch; every tensor is [batch, tokens].

    Attributes:
        real: tokens that are not padding.
        completion: real tokens whose next token carries a label, which is where the task loss trains the model.
            None where the batch has no labels.
        segments: for packed rows, a number per token that differs between the documents of a row; else None.
        labels: how many labels the task loss counts.
        next_labels: the label of the next token, -100 where there is none. None where the batch has no labels.
        safe: real tokens of safe rows (see :func:`~safelora_fast.interleave`). None where rows are not tagged.
    """

    real: torch.Tensor
    completion: torch.Tensor | None
    segments: torch.Tensor | None
    labels: int
    next_labels: torch.Tensor | None
    safe: torch.Tensor | None = None

    def mask(self, tokens: Tokens, *, owner: str) -> torch.Tensor:
        """The tokens that a defence looks at.

        Raises:
            SettingsError: completion tokens are asked for and the batch has no labels, or safe ones and it has no tags.
        """
        if tokens == "all":
            return self.real
        if tokens == "safe":
            if self.safe is None:
                raise SettingsError(
                    f'{owner}: tokens="safe" needs to know which rows are safe: mix them in with interleave(), and keep its '
                    f"column {SAFE} (TRL's packing drops it)"
                )
            return self.safe
        if self.completion is None:
            raise SettingsError(f'{owner}: tokens="completion" needs labels in the batch')
        return self.completion

    def sequences(self, mask: torch.Tensor) -> int:
        """Number of sequences (documents, in packed rows) with at least one token in `mask`."""
        if self.segments is None:
            return int(mask.any(dim=1).sum())
        rows = torch.arange(mask.shape[0], device=mask.device)[:, None].expand(mask.shape)
        return len(torch.stack([rows[mask], self.segments[mask]]).unique(dim=1).T)


def read_spans(batch: Mapping[str, Any]) -> Spans:
    """Read masks and documents from a batch as collators make them.

    Padding comes from `attention_mask` [batch, tokens]. Rows without one are full; when they carry `position_ids` or
    `seq_idx`, each restart of the positions begins a document, and documents of one token are left out: they hold no
    prediction, and padding of a packed row looks like them. `safe` is [batch] or [batch, tokens].

    Raises:
        SettingsError: the batch has no `input_ids` or `inputs_embeds`, or a mask is of another shape.
    """
    attention = batch.get("attention_mask")
    source = batch.get("input_ids")
    if source is None:
        source = batch.get("inputs_embeds")
    if source is None:
        raise SettingsError("the batch has neither input_ids nor inputs_embeds")
    shape = source.shape[:2]
    segments = _segments(batch, shape, source.device)
    if attention is not None:
        if attention.dim() != 2:
            raise SettingsError(
                f"attention_mask has shape {tuple(attention.shape)}: give [batch, tokens], or position_ids if packed"
            )
        real = attention != 0
    else:
        real = torch.ones(shape, dtype=torch.bool, device=source.device)
        if segments is not None:
            real = _longer_than_one(segments)
    labels = _next_labels(batch)
    completion = None
    if labels is not None:
        completion = real & (labels != IGNORED_LABEL)
        if segments is not None and "shift_labels" not in batch:
            completion = completion & _same_as_next(segments)
    count = 0 if labels is None else int((labels != IGNORED_LABEL).sum())
    return Spans(real, completion, segments, count, labels, _safe(batch, real))


def without_tags(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the model takes."""
    return {name: value for name, value in batch.items() if name != SAFE}


def _safe(batch: Mapping[str, Any], real: torch.Tensor) -> torch.Tensor | None:
    tags: torch.Tensor | None = batch.get(SAFE)
    if tags is None:
        return None
    if tags.dim() == 1:
        tags = tags[:, None]
    if tags.shape[0] != real.shape[0] or tags.shape[1] not in {1, real.shape[1]}:
        raise SettingsError(f"{SAFE} has shape {tuple(batch[SAFE].shape)}: give [batch], or [batch, tokens] if packed")
    return real & tags.to(real.device, torch.bool)


def _segments(batch: Mapping[str, Any], shape: torch.Size, device: torch.device) -> torch.Tensor | None:
    index = batch.get("seq_idx")
    if index is not None:
        return index.to(torch.long)
    positions = batch.get("position_ids")
    if positions is None or positions.dim() != 2:
        return None
    positions = positions.expand(shape)
    starts = torch.zeros(shape, dtype=torch.long, device=device)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return starts.cumsum(dim=1)


def _same_as_next(segments: torch.Tensor) -> torch.Tensor:
    same = torch.zeros_like(segments, dtype=torch.bool)
    same[:, :-1] = segments[:, :-1] == segments[:, 1:]
    return same


def _longer_than_one(segments: torch.Tensor) -> torch.Tensor:
    follows = _same_as_next(segments)
    longer = follows.clone()
    longer[:, 1:] |= follows[:, :-1]
    return longer


def _next_labels(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Label of the next token at each position [batch, tokens], as the loss of a causal model sees it."""
    shifted: torch.Tensor | None = batch.get("shift_labels")
    if shifted is not None:
        return shifted
    labels = batch.get("labels")
    if labels is None:
        return None
    ending = torch.full_like(labels[:, :1], IGNORED_LABEL)
    return torch.cat([labels[:, 1:], ending], dim=1)
