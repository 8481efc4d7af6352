"""The safe subspace of a pair of checkpoints, its file, and its construction."""

from __future__ import annotations

from safelora_fast.subspace.module_subspace import ModuleSubspace
from safelora_fast.subspace.safe_subspace import SafeSubspace

__all__ = ["ModuleSubspace", "SafeSubspace"]
