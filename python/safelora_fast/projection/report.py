"""The report of a projection, module by module: the contents of `safelora_report.json`."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePath
from typing import Any

from safelora_fast.checkpoints.model_card import shown_model
from safelora_fast.checkpoints.weight_norms import far_apart, median_ratio
from safelora_fast.files.store import without_nan
from safelora_fast.printable import counted

SCHEMA = 1
NEARLY_DELETED = 0.01


@dataclass(frozen=True)
class ModuleReport:
    """One module of one adapter. All norms are Frobenius norms; `gain` is ‖O·B‖/‖B‖ for the chosen operator O.

    `cosine` is the cosine of C·ΔW and ΔW with the paper's C, for any operator. `update_norm` excludes the LoRA scale.
    `v_ratio` is ‖V‖/‖W_aligned‖; for a large weight, the denominator is estimated from a sample of rows. `merge_error` is
    what a merge lost by its cut to the adapter's rank, relative to the norm of the merged update; else None. The gain of
    a merge is that of the update.
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
    v_ratio: float = math.nan
    merge_error: float | None = None


@dataclass(frozen=True)
class AdapterReport:
    """One adapter: its source, its output, its modules in checkpoint order, and the model named in its configuration.

    `copied` lists the tensors that are not factors, from :func:`~safelora_fast.projection.copied_tensors.copied_tensors`.
    `notes` are warnings about the adapter's files; `excluded` lists the modules that the user excluded.
    `fingerprint` is that of the written weights, from :func:`~safelora_fast.checkpoints.provenance.sampled`; None if nothing
    was written.
    """

    adapter: str
    output: str | None
    modules: list[ModuleReport]
    copied: list[dict[str, Any]]
    trained_on: str | None = None
    notes: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    fingerprint: str | None = None

    def __repr__(self) -> str:
        return f"AdapterReport({self.adapter!r}, {len(self.projected)} of {len(self.modules)} modules projected)"

    @property
    def projected(self) -> list[ModuleReport]:
        """The projected modules."""
        return [module for module in self.modules if module.projected]

    @property
    def v_ratio(self) -> float:
        """The median ‖V‖/‖W_aligned‖ over the modules, a measure of the distance between the two models."""
        return median_ratio(module.v_ratio for module in self.modules)


@dataclass(frozen=True)
class ProjectionReport:
    """The report of a run over one pair of checkpoints and one or more adapters."""

    settings: dict[str, Any]
    aligned: dict[str, Any]
    base: dict[str, Any]
    adapters: list[AdapterReport]
    bytes_read: int
    seconds: float
    versions: dict[str, str]
    schema: int = field(default=SCHEMA)

    def __repr__(self) -> str:
        first = f"{self.adapters[0]!r}{f' and {len(self.adapters) - 1} more' if len(self.adapters) > 1 else ''}"
        return (
            f"ProjectionReport({first}, {self.settings['operator']}, {self.selection}, {len(self.warnings)} warnings)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and dictionaries for JSON, with NaN as None and added counts."""
        content = without_nan(asdict(self))
        for adapter, plain in zip(self.adapters, content["adapters"], strict=True):
            plain["median_v_ratio"] = without_nan(adapter.v_ratio)
            plain["counts"] = {
                "modules": len(adapter.modules),
                "projected": len(adapter.projected),
                "without_cosine": sum(math.isnan(module.cosine) for module in adapter.modules),
                "copied_tensors": len(adapter.copied),
            }
        return {"schema": content.pop("schema"), **content}

    @property
    def selection(self) -> str:
        """A description of the selection rule."""
        if self.settings["select"] == "threshold":
            return f"cosine at most {self.settings['threshold']:g}"
        if self.settings["select"] == "number":
            return f"the {self.settings['num_layers']} lowest cosines"
        return "all modules"

    @property
    def warnings(self) -> list[str]:
        """Warnings about suspicious inputs and metrics."""
        found = [*self.aligned.get("warnings", ()), *self.base.get("warnings", ())]
        kinds = [str(model.get("model_type") or "").removesuffix("_text") for model in (self.aligned, self.base)]
        if all(kinds) and kinds[0] != kinds[1]:
            found.append(
                f"the configurations name models of different types ({kinds[0]} and {kinds[1]}): is {self.base['source']} the "
                f"model that {self.aligned['source']} was made from?"
            )
        for adapter in self.adapters:
            found += [f"{adapter.adapter}: {warning}" for warning in self._of_adapter(adapter)]
        return found

    def _of_adapter(self, adapter: AdapterReport) -> list[str]:
        found = [*self._of_pair(adapter), *adapter.notes]
        if adapter.excluded:
            more = f" and {len(adapter.excluded) - 3} more" if len(adapter.excluded) > 3 else ""
            found.append(
                f"{counted(len(adapter.excluded), 'module')} excluded as asked, not projected: "
                f"{', '.join(adapter.excluded[:3])}{more}"
            )
        found += [
            f"{item['tensor']}, which is copied through, holds NaN or Inf ({counted(item['not_finite'], 'value')}): the adapter "
            "was damaged before it came here"
            for item in adapter.copied
            if item.get("not_finite")
        ]
        if not adapter.projected:
            return [*found, "no module was selected, so nothing changes"]
        gain = statistics.median(module.gain for module in adapter.projected)
        errors = [module.merge_error for module in adapter.projected if module.merge_error is not None]
        if errors:
            found.append(
                f"merged updates were cut to the adapter's rank, which lost {statistics.median(errors):.2g} of their norm in the "
                f"median, at most {max(errors):.2g}"
            )
        if self.settings["operator"] != "zero" and gain < NEARLY_DELETED:
            found.append(
                f"the median gain ‖CB‖/‖B‖ is {gain:.2g}: projecting nearly deletes these updates; compare with --operator zero, "
                "or use --normalize spectral or --operator orthogonal"
            )
        return found

    def _of_pair(self, adapter: AdapterReport) -> list[str]:
        """Return warnings that the two models, or a model and the adapter, may not match."""
        found = [apart] if (apart := far_apart(adapter.v_ratio)) else []
        if zero := sum(module.v_norm == 0 for module in adapter.modules):
            modules = counted(len(adapter.modules), "module")
            found.append(f"aligned and base hold the same weights in {zero} of {modules}, which stay as they are")
        if (trained_on := adapter.trained_on) and not alike(trained_on, str(self.aligned["source"])):
            doubt = f"but aligned is {self.aligned['source']}; check that they are the same model"
            if alike(trained_on, str(self.base["source"])):
                doubt = (
                    "which is given as base: are the two models swapped? The projection is the same, but not the card"
                )
            found.append(f"says that it was trained on {trained_on}, {doubt}")
        return found


def published(report: ProjectionReport) -> ProjectionReport:
    """Return the report without local paths: only the last part of each folder and file name is kept."""

    def model(facts: dict[str, Any]) -> dict[str, Any]:
        source = facts["source"] if facts["revision"] else shown_model(facts["source"])
        warnings = [warning.replace(str(facts["source"]), source) for warning in facts.get("warnings", [])]
        files = [PurePath(file).name for file in facts["files"]]
        return {**facts, "source": source, "files": files, "warnings": warnings}

    def module(one: ModuleReport) -> ModuleReport:
        files = ("aligned_file", "base_file")
        sources = [{**pair, **{key: PurePath(pair[key]).name for key in files}} for pair in one.sources]
        return replace(one, sources=sources)

    adapters = [
        replace(
            one,
            adapter=shown_model(one.adapter),
            output=one.output and PurePath(one.output).name,
            modules=[module(each) for each in one.modules],
            trained_on=one.trained_on and shown_model(one.trained_on),
        )
        for one in report.adapters
    ]
    safe = report.settings.get("safe_adapter")
    settings = {**report.settings, **({"safe_adapter": shown_model(safe)} if safe else {})}
    return replace(report, settings=settings, aligned=model(report.aligned), base=model(report.base), adapters=adapters)


def alike(one: str, other: str) -> bool:
    """Return whether two paths or Hub ids may mean the same model: equal last parts, also inside the Hub's cache."""
    names = [path.rstrip("/").rpartition("/")[2].partition("@")[0].lower() for path in (one, other)]
    cached = [f"--{name}/" in f"{path.lower()}/" for name, path in zip(names, (other, one), strict=True)]
    return names[0] == names[1] or any(cached)
