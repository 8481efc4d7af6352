"""Make torch reuse freed memory. Otherwise a peer that makes temporaries pays for fresh pages at every call."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4


def reuse_memory() -> str:
    """Make this process keep freed memory; return the settings as text, for the table."""
    library = ctypes.CDLL(None)
    mallopt = getattr(library, "mallopt", None)
    if mallopt is None or not (mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1)):
        return "as found"
    return "M_MMAP_MAX=0 M_TRIM_THRESHOLD=-1"
