"""Defenses in a file of settings, for trainers of other libraries: the sections `defenses:` and `monitors:` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from safelora_fast.configuration.defense_section import (
    MONITORS,
    SECTION,
    DefenseSpec,
    MonitorSpec,
    Subspaces,
    read_defenses,
    read_monitors,
    read_on_nonfinite,
    read_reference,
)
from safelora_fast.configuration.yaml_document import read_document

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from safelora_fast.configuration.defense_section import OnNonFinite
    from safelora_fast.configuration.yaml_document import Document

KEY = "safelora_fast"  # the section of another library's file


@dataclass(frozen=True)
class DefenseSettings:
    """Checked settings of defenses; nothing is built or loaded yet.

    Attributes:
        source: the file, for messages.
        defenses: the defenses in file order.
        monitors: the monitors in file order.
        on_nonfinite, reference: as for :func:`~safelora_fast.training.defend`.
    """

    source: str
    defenses: tuple[DefenseSpec, ...]
    monitors: tuple[MonitorSpec, ...]
    on_nonfinite: OnNonFinite
    reference: str

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of :class:`~safelora_fast.trainers.transformers.DefendedMixin`; build subspaces.

        Raises:
            SafeLoraFastError: a vector or subspace does not exist or is invalid.
        """
        subspaces = Subspaces(build=True)
        return {
            "defenses": [spec.build(subspaces) for spec in self.defenses],
            "monitors": [spec.build() for spec in self.monitors],
            "on_nonfinite": self.on_nonfinite,
            "reference": self.reference,
        }


def read_settings(path: str | Path, *, key: str | None = None, overrides: Sequence[str] = ()) -> DefenseSettings:
    """Read and check the settings of a YAML file.

    Args:
        path: the file.
        key: the section of the file that holds the settings; None if they are its top level.
        overrides: settings that replace those of the file, as "section.key=value".

    Raises:
        SettingsError: with the file, the line and the dotted key.
    """
    document = read_document(path, overrides, what="settings")
    if key is not None:
        if not document.section(key):
            raise document.problem((key,), f"missing; say which defenses, e.g. `{key}: {{{SECTION}: {{kl: true}}}}`")
        document = document.below((key,))
    return settings_of(document)


def settings_of(document: Document) -> DefenseSettings:
    """Check the settings in a document.

    Raises:
        SettingsError: see :func:`read_settings`; also if nothing is switched on.
    """
    document = replace(document, what="recipe")  # unknown keys are explained as in a recipe
    for name in document.values:
        if name not in (SECTION, MONITORS):
            raise document.unknown((name,), (SECTION, MONITORS))
    settings = DefenseSettings(
        document.source,
        read_defenses(document),
        read_monitors(document),
        read_on_nonfinite(document),
        read_reference(document),
    )
    if not settings.defenses and not settings.monitors:
        raise document.problem((), f"there is no defense and no monitor; say {SECTION}: or {MONITORS}:")
    return settings
