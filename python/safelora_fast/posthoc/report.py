"""What a projection did, module by module: the content of `safelora_report.json`."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1
NEARLY_DELETED = 0.01


@dataclass(frozen=True)
class ModuleReport:
    """One module of one adapter. Norms are Frobenius norms; `gain` is ‖O·B‖/‖B‖ for the operator O that was asked for.

    `cosine` is that of C·ΔW and ΔW with the paper's C, whatever the operator. `update_norm` leaves the LoRA scale out.
    """

    name: str
    cosine: float
    projected: bool
    reason: str
    gain: float
    rank: int
    b_norm: float
    b_norm_after: float
    update_norm: float
    update_norm_after: float
    v_norm: float
    v_rank: int | None
    v_energy: float | None
    sources: list[dict[str, str]]


@dataclass(frozen=True)
class AdapterReport:
    """One adapter: where it came from, where it went, its modules in checkpoint order, and the model that it names.

    `copied` lists the tensors that are no factors, each with the reason and how many of its values are NaN or infinite.
    `notes` are warnings about the adapter's own files.
    """

    adapter: str
    output: str | None
    modules: list[ModuleReport]
    copied: list[dict[str, Any]]
    trained_on: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def projected(self) -> list[ModuleReport]:
        """The modules that were projected."""
        return [module for module in self.modules if module.projected]


@dataclass(frozen=True)
class ProjectionReport:
    """A whole run over one pair of checkpoints and one or more adapters."""

    settings: dict[str, Any]
    aligned: dict[str, Any]
    base: dict[str, Any]
    adapters: list[AdapterReport]
    bytes_read: int
    seconds: float
    versions: dict[str, str]
    schema: int = field(default=SCHEMA)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dictionaries for JSON, NaN as None, counts added."""
        content = _without_nan(asdict(self))
        for adapter, plain in zip(self.adapters, content["adapters"], strict=True):
            plain["counts"] = {
                "modules": len(adapter.modules),
                "projected": len(adapter.projected),
                "without_cosine": sum(math.isnan(module.cosine) for module in adapter.modules),
                "copied_tensors": len(adapter.copied),
            }
        return {"schema": content.pop("schema"), **content}

    @property
    def selection(self) -> str:
        """Which modules are projected, in words."""
        if self.settings["select"] == "threshold":
            return f"cosine at most {self.settings['threshold']:g}"
        if self.settings["select"] == "number":
            return f"the {self.settings['num_layers']} lowest cosines"
        return "all modules"

    @property
    def warnings(self) -> list[str]:
        """What a careful reader of the figures would tell the user."""
        found = [*self.aligned.get("warnings", ()), *self.base.get("warnings", ())]
        for adapter in self.adapters:
            if adapter.trained_on and not _alike(adapter.trained_on, str(self.aligned["source"])):
                found.append(
                    f"{adapter.adapter}: says that it was trained on {adapter.trained_on}, but aligned is "
                    f"{self.aligned['source']}; see that they are the same model"
                )
            found += [f"{adapter.adapter}: {note}" for note in adapter.notes]
            found += [
                f"{adapter.adapter}: {item['tensor']}, which is copied through, holds NaN or Inf "
                f"({counted(item['not_finite'], 'value')}): the adapter was damaged before it came here"
                for item in adapter.copied
                if item.get("not_finite")
            ]
            if not adapter.projected:
                found.append(f"{adapter.adapter}: no module was selected, so the adapter stays as it is")
                continue
            gain = statistics.median(module.gain for module in adapter.projected)
            if self.settings["operator"] != "zero" and gain < NEARLY_DELETED:
                found.append(
                    f"{adapter.adapter}: the median gain ‖CB‖/‖B‖ is {gain:.2g}: projecting nearly deletes these updates; "
                    "compare with --operator zero, or use --normalize spectral or --operator orthogonal"
                )
        return found


def counted(count: int, noun: str) -> str:
    """A number of things, in words: 1 tensor, 2 tensors."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _alike(one: str, other: str) -> bool:
    """Whether two paths or Hub ids may mean one model: the same last name, in the Hub's cache too."""
    names = [path.rstrip("/").rpartition("/")[2].partition("@")[0].lower() for path in (one, other)]
    cached = [f"--{name}/" in f"{path.lower()}/" for name, path in zip(names, (other, one), strict=True)]
    return names[0] == names[1] or any(cached)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
