"""Fast SafeLoRA projection and in-training defences against emergent misalignment.

Importing this package imports neither torch nor transformers; public names are loaded when first used.
"""

from __future__ import annotations

from safelora_fast._core import __version__

__all__ = ["__version__"]
