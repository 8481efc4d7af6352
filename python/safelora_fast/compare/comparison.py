"""A comparison: one recipe, the runs that differ from it, their seeds, and the settings of the measures."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.compare.runs import REFERENCE, Run, finished_adapter
from safelora_fast.configuration.yaml_document import Document
from safelora_fast.recipe.recipe import recipe_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from safelora_fast.compare.runs import RunSpec
    from safelora_fast.recipe.recipe import Recipe


@dataclass(frozen=True)
class CompareConfig:
    """A validated configuration.

    Attributes:
        document: the parsed YAML file.
        title: title of the report.
        recipe: recipe sections that all runs share, without `output`.
        seeds: `training.seed` of every run.
        runs: in file order; the others are compared with the first.
        measure: settings of the measures.
        output: folder of the runs, measurements and report.
    """

    document: Document
    title: str
    recipe: dict[str, Any]
    seeds: tuple[int, ...]
    runs: tuple[RunSpec, ...]
    measure: Any
    output: Path

    def recipe_for(self, spec: RunSpec, run: Run, changes: Mapping[str, Any] | None = None) -> Recipe:
        """Return the recipe of one run.

        Args:
            spec: the defense.
            run: the run, which gives the training seed and the adapter's folder.
            changes: settings of the measure that needs the run, merged over everything else.

        Raises:
            SettingsError: with the file, the line and the dotted key.
        """
        values = copy.deepcopy(self.recipe)
        _put(values, spec.changes)
        _put(values, changes or {})
        _put(values, {"training": {"seed": run.seed}, "output": {"folder": str(run.adapter)}})
        common, changed = (self.document.below(keys) for keys in (("recipe",), ("runs", spec.name)))
        lines, overridden = common.lines | changed.lines, common.overridden | changed.overridden
        return recipe_of(Document(self.document.source, values, lines, overridden))

    def seeds_of(self, spec: RunSpec) -> tuple[int, ...]:
        """Return the seeds of a defense: those of its finished adapters, or else the comparison's."""
        return tuple(spec.adapters) or self.seeds


def runs_of(config: CompareConfig, spec: RunSpec) -> list[Run]:
    """Return the runs of a defense, one per seed."""
    found = []
    for seed in config.seeds_of(spec):
        folder = config.output / spec.folder / f"seed-{seed}"
        source = spec.adapters.get(seed)
        adapter = folder / "adapter" if source is None else finished_adapter(source)
        found.append(Run(spec.name, seed, folder, adapter, is_trained=source is None))
    return found


def reference_of(config: CompareConfig) -> Run:
    """Return the reference: the model before the fine-tune."""
    return Run(REFERENCE, None, config.output / REFERENCE, None)


def _put(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Merge mappings recursively; any other value replaces the old one."""
    for key, change in changes.items():
        former = values.get(key)
        if isinstance(change, dict) and isinstance(former, dict):
            _put(former, change)
        else:
            values[key] = copy.deepcopy(change)


def all_runs(config: CompareConfig) -> list[Run]:
    """Return the reference, and every run of every defense."""
    return [reference_of(config), *(run for spec in config.runs for run in runs_of(config, spec))]
