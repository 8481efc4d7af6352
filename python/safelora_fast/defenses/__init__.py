"""Defenses and monitors that run while a model is fine-tuned, one file each.

All files of this folder are imported here. Each defense registers itself (see :class:`Defense`), so there is no list
to maintain.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from safelora_fast.defenses.base import BatchDefense as BatchDefense
from safelora_fast.defenses.base import Defense as Defense
from safelora_fast.defenses.base import registered as registered
from safelora_fast.defenses.drift_monitor import DriftMonitor as DriftMonitor

if TYPE_CHECKING:  # for type checkers, which do not run the loop below
    from safelora_fast.defenses.feature_distance import FeatureDistance as FeatureDistance
    from safelora_fast.defenses.kl import KL as KL
    from safelora_fast.defenses.safelora import SafeLora as SafeLora
    from safelora_fast.defenses.steering import Steering as Steering
    from safelora_fast.defenses.subspace_penalty import SubspacePenalty as SubspacePenalty
    from safelora_fast.defenses.template_anchor import TemplateAnchor as TemplateAnchor

for _file in iter_modules(__path__):
    if not _file.ispkg:
        import_module(f"{__name__}.{_file.name}")


def __getattr__(name: str) -> Any:
    for kind in registered().values():
        if kind.__name__ == name:
            return kind
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
