"""Models whose rotary positions depend on how long a sequence is, so that company changes what they say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTINGS = ("rope_parameters", "rope_scaling")  # from transformers 5, and before
ORIGINAL = "original_max_position_embeddings"


def stretched_beyond(config: Any) -> int | None:
    """The tokens beyond which a model turns all positions otherwise (dynamic NTK, LongRoPE); None where it never does.

    Such a model takes the longest sequence of a batch for the length of all, and keys that it made of a short prefix are
    wrong behind it.

    Args:
        config: of the text model.
    """
    limits = []
    for name in SETTINGS:
        for rope in _ropes(getattr(config, name, None)):
            kind = rope.get("rope_type", rope.get("type"))
            if kind == "longrope":
                limit = rope.get(ORIGINAL) or getattr(config, ORIGINAL, None) or config.max_position_embeddings
                limits.append(int(limit))
            elif isinstance(kind, str) and "dynamic" in kind:
                limits.append(int(config.max_position_embeddings))
    return min(limits, default=None)


def _ropes(settings: Any) -> Iterator[Mapping[str, Any]]:
    """Settings of rotary embeddings: one for all layers, or one for each kind of layer."""
    if isinstance(settings, Mapping):
        yield settings
        for value in settings.values():
            yield from _ropes(value)
