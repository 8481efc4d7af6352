"""Models in what is published (cards and reports): ids of the Hub, and of what lies on this machine the last name only."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import label

if TYPE_CHECKING:
    from safelora_fast.projection.report import AdapterReport, ProjectionReport

ABSOLUTE = re.compile(r"(?<![\w.:/])~?/(?:[^\s/,;'\"]+/)+[^\s/,;:'\"]+")
HUB_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_id(source: str) -> str | None:
    """The Hub id that a model was given by, or that a folder of the Hub's cache is of; None for what only lies on this machine."""
    shown = label(Path(source)).partition("@")[0]
    if HUB_MODEL.fullmatch(shown) is None or (shown == source and Path(source).expanduser().exists()):
        return None
    return shown


def shown_model(source: str) -> str:
    """A model's Hub id, or the last part of its path."""
    return hub_id(source) or PurePath(source).name or source


def shown_paths(text: str) -> str:
    """A text in which absolute paths are left with their last part."""
    if PurePath(text).is_absolute():
        return PurePath(text).name
    return ABSOLUTE.sub(lambda path: PurePath(path[0]).name, text)


def base_model(*sources: str | None) -> list[str]:
    """The line of a card's front matter that names the model: the first of the sources that is of the Hub, or no line.

    The Hub refuses a card that names a model by a path.
    """
    found = next((name for source in sources if source and (name := hub_id(source))), None)
    return [] if found is None else [f"base_model: {found}"]


def published(report: ProjectionReport) -> ProjectionReport:
    """A report without the paths of this machine: of folders and files the last part is left."""

    def model(facts: dict[str, Any]) -> dict[str, Any]:
        source = facts["source"] if facts["revision"] else shown_model(facts["source"])
        warnings = [warning.replace(str(facts["source"]), source) for warning in facts.get("warnings", [])]
        return {
            **facts,
            "source": source,
            "files": [PurePath(file).name for file in facts["files"]],
            "warnings": warnings,
        }

    return replace(
        report,
        aligned=model(report.aligned),
        base=model(report.base),
        adapters=[_adapter(one) for one in report.adapters],
    )


def _adapter(adapter: AdapterReport) -> AdapterReport:
    modules = [
        replace(
            module,
            sources=[
                {key: PurePath(value).name if key.endswith("_file") else value for key, value in source.items()}
                for source in module.sources
            ],
        )
        for module in adapter.modules
    ]
    return replace(
        adapter,
        adapter=shown_model(adapter.adapter),
        output=None if adapter.output is None else PurePath(adapter.output).name,
        modules=modules,
        trained_on=None if adapter.trained_on is None else shown_model(adapter.trained_on),
    )
