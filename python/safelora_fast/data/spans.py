"""What a batch says about its tokens: which are real, predict a completion token or are safe; where documents begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from safelora_fast.data.interleave import SAFE
from safelora_fast.data.tokens import IGNORED_LABEL
from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

Tokens = Literal["all", "completion", "safe"]


@dataclass(frozen=True)
class Spans:
    """The tokens of one micro-batch; every tensor is [batch, tokens].

    Attributes:
        real: tokens that are not padding.
        completion: real tokens whose next token carries a label, where the task loss trains the model.
            None if the batch has no labels.
        segments: for packed rows, a number per token that differs between the documents of a row; else None.
        labels: how many labels the task loss counts.
        next_labels: the label of the next token, -100 where there is none. None if the batch has no labels.
        safe: real tokens of safe examples (see :func:`~safelora_fast.interleave`). None if examples are not tagged.
    """

    real: torch.Tensor
    completion: torch.Tensor | None
    segments: torch.Tensor | None
    labels: int
    next_labels: torch.Tensor | None
    safe: torch.Tensor | None = None

    def mask(self, tokens: Tokens, *, owner: str) -> torch.Tensor:
        """The tokens that a defense looks at.

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
    `seq_idx`, each restart of the positions begins a document (a jump ahead does not), and documents of one token are left
    out: they hold no prediction, and padding of a packed row looks like them. `safe` is [batch] or [batch, tokens].

    With `logits_to_keep`, labels may be those of the kept positions only.

    Raises:
        SettingsError: the batch has no `input_ids` or `inputs_embeds`, a mask or labels are of another shape, or
            positions jump in rows without a mask, so that it cannot be told where documents begin.
    """
    attention = batch.get("attention_mask")
    source = batch.get("input_ids")
    if source is None:
        source = batch.get("inputs_embeds")
    if source is None:
        raise SettingsError("the batch has neither input_ids nor inputs_embeds")
    shape = source.shape[:2]
    segments = _segments(batch, shape)
    if attention is not None:
        if not isinstance(attention, torch.Tensor) or attention.dim() != 2:
            found = f"shape {tuple(attention.shape)}" if isinstance(attention, torch.Tensor) else "more than one mask"
            raise SettingsError(f"attention_mask has {found}: give [batch, tokens], or position_ids if packed")
        real = attention != 0
    else:
        real = torch.ones(shape, dtype=torch.bool, device=source.device)
        if segments is not None:
            real = _longer_than_one(segments)
    labels = _next_labels(batch, shape)
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


def _segments(batch: Mapping[str, Any], shape: torch.Size) -> torch.Tensor | None:
    index = batch.get("seq_idx")
    if index is not None:
        return index.to(torch.long)
    positions = batch.get("position_ids")
    if (
        positions is not None and positions.dim() == 3 and positions.shape[0] == 4
    ):  # Qwen2-VL: the text's, then three axes
        positions = positions[0]
    if positions is None or positions.dim() != 2:
        return None
    positions = positions.expand(shape)
    steps = positions.diff(dim=1)
    restarts = (steps < 0) | (positions[:, 1:] == 0)
    if batch.get("attention_mask") is None and bool(((steps != 1) & ~restarts).any()):
        raise SettingsError(
            "position_ids jump or repeat, and there is no attention_mask, so it is unclear where documents begin: give an "
            "attention_mask if each row is one document, else seq_idx, or positions that restart at 0"
        )
    return torch.nn.functional.pad(restarts.long().cumsum(dim=1), (1, 0))


def _same_as_next(segments: torch.Tensor) -> torch.Tensor:
    same = torch.zeros_like(segments, dtype=torch.bool)
    same[:, :-1] = segments[:, :-1] == segments[:, 1:]
    return same


def _longer_than_one(segments: torch.Tensor) -> torch.Tensor:
    follows = _same_as_next(segments)
    longer = follows.clone()
    longer[:, 1:] |= follows[:, :-1]
    return longer


def _next_labels(batch: Mapping[str, Any], shape: torch.Size) -> torch.Tensor | None:
    """Label of the next token at each position [batch, tokens], as the loss of a causal model sees it."""
    name = "labels" if batch.get("shift_labels") is None else "shift_labels"
    labels: torch.Tensor | None = batch.get(name)
    if labels is None:
        return None
    if name == "labels":
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    if labels.shape == shape:
        return labels
    kept = _kept_positions(batch.get("logits_to_keep"), shape[1], labels.device)
    if labels.dim() != 2 or labels.shape != (shape[0], len(kept)):
        raise SettingsError(
            f"{name} have shape {tuple(labels.shape)}, the tokens {tuple(shape)}: give one for each token, or for each "
            "position that logits_to_keep keeps"
        )
    whole = labels.new_full(shape, IGNORED_LABEL)
    whole[:, kept] = labels
    return whole


def _kept_positions(kept: Any, tokens: int, device: torch.device) -> torch.Tensor:
    """The positions of which a model makes logits: all, the last so many, or those of a mask or of indices."""
    positions = torch.arange(tokens, device=device)
    kept = torch.as_tensor(0 if kept is None else kept, device=device)
    if kept.dim() == 0:
        return positions[-int(kept) :]
    fits = kept.dim() == 1 and (kept.dtype != torch.bool or len(kept) == tokens)
    return positions[kept] if fits else positions
