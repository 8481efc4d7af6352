"""The `monitors:` section: names for the log, each with the arguments of DriftMonitor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.defenses import DriftMonitor
from safelora_fast.recipe.defense_section import check_arguments

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safelora_fast.recipe.yaml_document import Document

MONITORS = "monitors"


@dataclass(frozen=True)
class MonitorSpec:
    """One monitor as the recipe asks for it.

    Attributes:
        name: its name in the log, `monitor/<name>`.
        settings: the other arguments of DriftMonitor, as YAML can say them.
    """

    name: str
    settings: Mapping[str, Any]

    def build(self) -> DriftMonitor:
        """The monitor; its file is read.

        Raises:
            SettingsError: the vector or the name is not as it must be.
        """
        return DriftMonitor(**self.settings, name=self.name)


def read_monitors(document: Document) -> tuple[MonitorSpec, ...]:
    """The checked section.

    Raises:
        SettingsError: a setting does not exist, is missing, or of another type.
    """
    specs = []
    for name, given in document.section(MONITORS).items():
        keys = (MONITORS, name)
        if not isinstance(given, dict):
            raise document.problem(keys, f"must be a mapping of settings (vector, layer), not {given!r}")
        specs.append(MonitorSpec(name, check_arguments(document, keys, DriftMonitor, given, but={"name"})))
    return tuple(specs)
