"""Token masks of a batch (real, completion, safe and template tokens), and the documents of packed sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from safelora_fast.data.interleave import SAFE
from safelora_fast.data.tokens import IGNORED_LABEL
from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safelora_fast.data.batch_part import Part
    from safelora_fast.data.template_tokens import TemplateTokens

HIDDEN = -1e3  # a number that is added to attention scores and hides a token is below
Tokens = Literal["all", "completion", "safe", "prefix", "header"]


@dataclass(frozen=True)
class Spans:
    """The tokens of one micro-batch; every tensor is [batch, tokens].

    Attributes:
        real: tokens that are not padding.
        completion: real tokens whose next token has a label, so that the task loss trains on them. None without labels.
        segments: for packed sequences, a document number per token, unique within a sequence; else None.
        labels: number of labels in the task loss.
        next_labels: the label of the next token, or -100. None if the batch has no labels.
        safe: real tokens of safe examples (see :func:`~safelora_fast.interleave`). None if examples are not tagged.
        draws: a random number of each example at its tokens (see :func:`~safelora_fast.data.draws.draws`). None if no
            defense samples.
        ids: token ids. None if the batch has embeddings.
        template: finds the tokens of the chat template. None if no defense asks for them.
    """

    real: torch.Tensor
    completion: torch.Tensor | None
    segments: torch.Tensor | None
    labels: int
    next_labels: torch.Tensor | None
    safe: torch.Tensor | None = None
    draws: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    template: TemplateTokens | None = None

    def drawn(self, share: float) -> Spans:
        """Return the spans with masks that contain a random share of the examples, those with a lower draw than it."""
        if self.draws is None or share == 1:
            return self
        kept = self.draws < share
        completion = None if self.completion is None else self.completion & kept
        safe = None if self.safe is None else self.safe & kept
        return replace(self, real=self.real & kept, completion=completion, safe=safe)

    def of_part(self, part: Part) -> Spans:
        """Return the spans of a part of the batch."""
        values = vars(self)
        taken = {name: part.take(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        labels = taken.get("next_labels")
        count = 0 if labels is None else int((labels != IGNORED_LABEL).sum())
        return Spans(**{**values, **taken, "labels": count})

    def mask(self, tokens: Tokens, *, owner: str) -> torch.Tensor:
        """Return the mask of the tokens that a defense uses.

        Raises:
            SettingsError: `tokens` is "completion" and the batch has no labels, "safe" and it has no tags, or a part of
                the chat template and the batch has no token ids.
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
        if tokens == "completion":
            if self.completion is None:
                raise SettingsError(f'{owner}: tokens="completion" needs labels in the batch')
            return self.completion
        if self.ids is None or self.template is None:
            raise SettingsError(f"{owner}: tokens={tokens!r} needs input_ids in the batch, and their tokenizer")
        return self.template.mask(self.ids, self.real, self.segments, tokens)

    def completion_places(self, *, owner: str) -> torch.Tensor:
        """Return for each token the place, from 1, of the completion token that it predicts: [batch, tokens]; 0 for none.

        Each completion of a conversation begins at 1.

        Raises:
            SettingsError: the batch has no labels.
        """
        if self.completion is None or self.next_labels is None:
            raise SettingsError(f"{owner} needs labels in the batch")
        inside: torch.Tensor = self.next_labels != IGNORED_LABEL
        begins = torch.ones_like(inside)
        begins[:, 1:] = ~inside[:, :-1]
        if self.segments is not None:
            begins[:, 1:] |= self.segments[:, 1:] != self.segments[:, :-1]
        index = torch.arange(inside.shape[1], device=inside.device).expand(inside.shape)
        return (index - index.where(begins, 0).cummax(dim=1).values + 1).where(self.completion, 0)

    def sequences(self, mask: torch.Tensor) -> int:
        """Return the number of sequences (documents, if packed) with at least one token in `mask`."""
        if self.segments is None:
            return int(mask.any(dim=1).sum())
        rows = torch.arange(mask.shape[0], device=mask.device)[:, None].expand(mask.shape)
        return len(torch.stack([rows[mask], self.segments[mask]]).unique(dim=1).T)


def read_spans(batch: Mapping[str, Any], template: TemplateTokens | None = None) -> Spans:
    """Read masks and documents from a collated batch.

    `attention_mask` [batch, tokens] marks padding; one of [batch, 1, tokens, tokens] also separates documents. Without it,
    all tokens are real, except in packed sequences: there, `position_ids` or `seq_idx` mark documents, and documents of
    one token are excluded. They contain no prediction, and padding looks like them. Each restart of the positions starts
    a document; a jump ahead does not. `safe` is [batch] or [batch, tokens].

    With `logits_to_keep`, labels may cover only the kept positions.

    Raises:
        SettingsError: the batch has neither `input_ids` nor `inputs_embeds`, a mask or labels have the wrong shape, or
            positions jump without a mask, so that document boundaries are ambiguous.
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
        real = None
        if isinstance(attention, torch.Tensor) and attention.dim() == 4:
            real, segments = _read_square_mask(attention, shape)
        elif isinstance(attention, torch.Tensor) and attention.dim() == 2:
            real = attention != 0
        if real is None:
            found = f"shape {tuple(attention.shape)}" if isinstance(attention, torch.Tensor) else "more than one mask"
            raise SettingsError(
                f"attention_mask has {found}: give [batch, tokens] or [batch, 1, tokens, tokens], or position_ids if packed"
            )
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
    safe, ids = _safe(batch, real), batch.get("input_ids")
    return Spans(real, completion, segments, count, labels, safe, ids=ids, template=template)


def without_tags(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch without the tags, as the model expects it."""
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
    ):  # Qwen2-VL: text positions, then three axes
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


def _read_square_mask(mask: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Read a mask [batch or 1, heads or 1, tokens, tokens] of bool, or of 0 and large negative numbers.

    A token that does not see itself is padding, and one that does not see the token before it begins a document.

    Returns:
        The real tokens, and the documents if a row has several; (None, None) if it is no such mask.
    """
    if mask.shape[0] not in {1, shape[0]} or mask.shape[2:] != (shape[1], shape[1]):
        return None, None
    if mask.dtype != torch.bool and not (mask.is_floating_point() and bool((mask <= 0).all())):
        return None, None

    def sees(distance: int) -> torch.Tensor:
        seen = mask[:, 0].diagonal(-distance, 1, 2).expand(shape[0], -1)
        return seen if seen.dtype == torch.bool else seen > HIDDEN

    real, begins = sees(0), ~sees(1)
    segments = torch.nn.functional.pad(begins.long().cumsum(dim=1), (1, 0))
    return real, segments if bool((begins & real[:, 1:] & real[:, :-1]).any()) else None


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
    """Return the label of the next token at each position [batch, tokens], as in the causal loss."""
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
    """Return the positions with logits: all, the last `kept`, or those of a mask or index tensor."""
    positions = torch.arange(tokens, device=device)
    kept = torch.as_tensor(0 if kept is None else kept, device=device)
    if kept.dim() == 0:
        return positions[-int(kept) :]
    fits = kept.dim() == 1 and (kept.dtype != torch.bool or len(kept) == tokens)
    return positions[kept] if fits else positions
