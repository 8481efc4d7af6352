"""Cutting the arguments of a model to a part of its batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.models.capture import Call

if TYPE_CHECKING:
    from torch import nn

    from safelora_fast.data.batch_part import Part

# Arguments whose rows and tokens are those of the batch, and arguments of the head, which the reference does not run.
BY_TOKEN = {"input_ids", "inputs_embeds", "token_type_ids", "mm_token_type_ids", "labels", "shift_labels", "seq_idx"}
OF_HEAD = {"logits_to_keep", "num_items_in_batch"}
# Rotary embeddings that depend on the longest row of the batch, and the setting with the length from which on they do.
BY_LENGTH = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}


def part_of_call(module: nn.Module, call: Call, part: Part) -> Call | None:
    """Return the call of a module with the arguments of a part of the batch; None if one of them cannot be cut.

    These can be cut by rows: token ids and types, embeddings and labels [batch, tokens, ...]; attention masks
    [batch, tokens], and [batch or 1, heads or 1, tokens, tokens]; positions [batch or 1, tokens] and
    [axes, batch, tokens]; `seq_idx` [batch, tokens]. Any other tensor, such as pixel values, `cu_seq_lens` or a mapping
    of masks, may belong to rows in a way that is not known.

    Documents can be cut from packed rows if positions [batch, tokens] alone separate them, each starting at 0.
    """
    names = list(inspect.signature(module.forward).parameters)
    if len(call.args) > len(names):
        return None
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    if part.columns is not None and not _documents_can_be_cut(given, part):
        return None
    cut = {name: _part_of(name, value, part) for name, value in given.items()}
    if any(cut[name] is None and value is not None for name, value in given.items()):
        return None
    return Call(tuple(cut[name] for name in names[: len(call.args)]), {name: cut[name] for name in call.kwargs})


def _documents_can_be_cut(given: Mapping[str, Any], part: Part) -> bool:
    """Return whether positions, and nothing else, separate the documents, also where others are cut out between them."""
    positions = given.get("position_ids")
    if not isinstance(positions, torch.Tensor) or positions.shape != (part.batch, part.tokens):
        return False
    if any(given.get(name) is not None for name in ("attention_mask", "seq_idx")):
        return False
    assert part.columns is not None  # noqa: S101
    joined = part.columns.diff(dim=1) != 1
    return not part.take(positions)[:, 1:].cpu()[joined].any()


def _part_of(name: str, value: Any, part: Part) -> Any:
    """Return the part of one argument; None if it cannot be cut."""
    if not isinstance(value, torch.Tensor):
        return None if any(Call((value,), {}).tensors()) else value
    if name in OF_HEAD:
        return value
    shape, batch, tokens = tuple(value.shape), part.batch, part.tokens
    cut = None
    if name in OF_HEAD:
        cut = value
    elif name in BY_TOKEN or (name == "attention_mask" and value.dim() == 2):
        cut = part.take(value) if shape[:2] == (batch, tokens) else None
    elif name == "attention_mask" and shape[2:] == (tokens, tokens) and shape[0] in {1, batch}:
        cut = (value if shape[0] == 1 else part.take_rows(value))[..., : part.width, : part.width]
    elif (name == "position_ids" and shape == (1, tokens)) or (name == "cache_position" and shape == (tokens,)):
        cut = value[..., : part.width]
    elif name == "position_ids" and shape[-2:] == (batch, tokens):
        cut = part.take(value, dim=value.dim() - 2)
    return cut


def depends_on_longest_row(config: Any, call: Call, tokens: int) -> bool:
    """Return whether rotary embeddings depend on the longest row of this call's batch, whose rows have `tokens` tokens."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = []
    for rope in (settings, *settings.values()):  # of all layers, or by kind of layer
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
        if kind in BY_LENGTH:
            name = BY_LENGTH[kind]
            limits.append(int(rope.get(name) or getattr(config, name, None) or config.max_position_embeddings))
    if not limits:
        return False
    positions = call.kwargs.get("position_ids")
    longest = tokens if positions is None else int(positions.max()) + 1
    return longest > min(limits)
