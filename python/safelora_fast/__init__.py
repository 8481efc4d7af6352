"""Fast SafeLoRA projection and in-training defences against emergent misalignment.

Importing this package imports neither torch nor transformers; public names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from safelora_fast._core import __version__

if TYPE_CHECKING:
    from safelora_fast.posthoc.peft_model import project_peft_model
    from safelora_fast.posthoc.project import project_adapter
    from safelora_fast.posthoc.report import ProjectionReport

_HOMES = {
    "ProjectionReport": "safelora_fast.posthoc.report",
    "project_adapter": "safelora_fast.posthoc.project",
    "project_peft_model": "safelora_fast.posthoc.peft_model",
}

__all__ = ["ProjectionReport", "__version__", "project_adapter", "project_peft_model"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
