"""Memory that torch gets back after it freed it: otherwise a peer that makes temporaries pays for fresh pages, call by call."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4


def reuse_memory() -> str:
    """Let this process keep what it frees; returns the settings in words, for the table."""
    library = ctypes.CDLL(None)
    mallopt = getattr(library, "mallopt", None)
    if mallopt is None or not (mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1)):
        return "as found"
    return "M_MMAP_MAX=0 M_TRIM_THRESHOLD=-1"
