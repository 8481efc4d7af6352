"""Operations on torch tensors, for people who embed them. Each is loaded when first used, and torch with it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safelora_fast.ops.subspace_projection import subspace_projection

_HOMES = {"subspace_projection": "safelora_fast.ops.subspace_projection"}

__all__ = ["subspace_projection"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
