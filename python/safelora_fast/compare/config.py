"""The configuration of a comparison: one recipe, the runs that differ from it, and what is measured on each."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.compare.measure_sections import MeasureSection
from safelora_fast.errors import SettingsError
from safelora_fast.judging.operator_swap import TRAIN
from safelora_fast.recipe.recipe import SECTIONS, recipe_of
from safelora_fast.recipe.yaml_document import Document, read_document
from safelora_fast.recipe.yaml_section import read_section

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.files.yaml_reader import Keys
    from safelora_fast.recipe.recipe import Recipe

KEYS = ("title", "recipe", "seeds", "runs", "measure", "output")
FINISHED = "adapters"
REFERENCE = "reference"
OPERATOR_SWAP = "operator-swap"
RESERVED = (REFERENCE, OPERATOR_SWAP)  # folders beside those of the runs
UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class RunSpec:
    """One defence: what it changes in the recipe, or the finished adapters that are taken in its place.

    Attributes:
        name: as the configuration has it.
        changes: sections of a recipe, put on top of the common one.
        adapters: folders or Hub ids of finished adapters by seed; empty where the runs are trained here.
    """

    name: str
    changes: dict[str, Any]
    adapters: Mapping[int, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return UNSAFE.sub("-", self.name.lower()).strip("-.") or "run"


@dataclass(frozen=True)
class CompareConfig:
    """A checked configuration.

    Attributes:
        document: what it was read from.
        title: of the report.
        recipe: sections of a recipe that all runs share; its `output` is left out.
        seeds: of every run, `training.seed`.
        runs: in the order of the file; the first is the one that the others are held against.
        measure: what is measured.
        output: folder of runs, measurements and report.
    """

    document: Document
    title: str
    recipe: dict[str, Any]
    seeds: tuple[int, ...]
    runs: tuple[RunSpec, ...]
    measure: MeasureSection
    output: Path

    def recipe_for(self, run: RunSpec, seed: int, output: Path, extra: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe of one run.

        Args:
            run: the defence.
            seed: of the training.
            output: where its adapter goes.
            extra: settings of the measure that needs the run, put on top of all.

        Raises:
            SettingsError: with the file, the line and the dotted key.
        """
        values, lines = copy.deepcopy(self.recipe), self._lines(("recipe",))
        _put(values, run.changes)
        lines |= self._lines(("runs", run.name))
        _put(values, extra or {})
        _put(values, {"training": {"seed": seed}, "output": {"folder": str(output)}})
        overridden = self._overridden(("recipe",)) | self._overridden(("runs", run.name))
        return recipe_of(Document(self.document.source, values, lines, overridden))

    def seeds_of(self, run: RunSpec) -> tuple[int, ...]:
        """The seeds of a run: those of its finished adapters where it has some."""
        return tuple(run.adapters) or self.seeds

    def swap_changes(self) -> dict[str, Any]:
        """What a recipe becomes for the operator-swap task: its rows, and no held-out ones."""
        swap = self.measure.operator_swap
        assert swap is not None  # noqa: S101
        data = {"path": str(self.output / OPERATOR_SWAP / TRAIN), "eval": None, "max_rows": None}
        return {"data": data, "training": {"eval_strategy": "no", "eval_on_start": False, **swap.training}}

    def _lines(self, prefix: Keys) -> dict[Keys, int]:
        count = len(prefix)
        return {keys[count:]: line for keys, line in self.document.lines.items() if keys[:count] == prefix}

    def _overridden(self, prefix: Keys) -> set[Keys]:
        """What overrides set below a prefix, or the whole of it."""
        count = len(prefix)
        return {keys[count:] for keys in self.document.overridden if keys[:count] == prefix}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CompareConfig:
    """Read and check a configuration, the recipe of every run included; no model is loaded.

    Args:
        path: the YAML file.
        overrides: settings put on top, "section.key=value" with YAML values.

    Raises:
        SettingsError: with the file, the line and the dotted key.
        MissingDependencyError: a package that training needs is missing.
    """
    document = read_document(path, overrides, what="comparison")
    for name in document.values:
        if name not in KEYS:
            raise document.unknown((name,), KEYS)
    output = document.values.get("output")
    if not isinstance(output, str) or not output:
        raise document.problem(("output",), "must name the folder of runs, measurements and report")
    config = CompareConfig(
        document=document,
        title=_title(document),
        recipe=_sections(document, ("recipe",)),
        seeds=_seeds(document),
        runs=_runs(document),
        measure=read_section(document, ("measure",), MeasureSection),
        output=Path(output).expanduser(),
    )
    _check(config)
    return config


def _title(document: Document) -> str:
    title = document.values.get("title", "Defences compared")
    if not isinstance(title, str) or not title.strip():
        raise document.problem(("title",), "must be text")
    return title


def _sections(document: Document, keys: Keys) -> dict[str, Any]:
    values = document.section(*keys)
    known = [name for name in SECTIONS if name != "output"]
    for name in values:
        if name == "output":
            raise document.problem((*keys, name), "every run has a folder of its own in the comparison's; leave it out")
        if name not in known:
            raise document.unknown((*keys, name), known)
    return dict(values)


def _seeds(document: Document) -> tuple[int, ...]:
    seeds = document.values.get("seeds", [0])
    whole = isinstance(seeds, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not whole or not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise document.problem(("seeds",), f"must be a list of different whole numbers from 0, not {seeds!r}")
    return tuple(seeds)


def _runs(document: Document) -> tuple[RunSpec, ...]:
    found = document.section("runs")
    if not found:
        raise document.problem(
            ("runs",), "missing: name the runs to compare, the undefended one first, e.g. `none: {}`"
        )
    runs = tuple(_run(document, name) for name in found)
    for number, run in enumerate(runs):
        if run.folder in RESERVED:
            raise document.problem(
                ("runs", run.name), f"{run.folder} is a folder of the comparison's own; rename the run"
            )
        twin = next((other for other in runs[:number] if other.folder == run.folder), None)
        if twin is not None:
            raise document.problem(("runs", run.name), f"{twin.name!r} would have the same folder; choose another name")
    return runs


def _run(document: Document, name: str) -> RunSpec:
    keys = ("runs", name)
    values = document.section(*keys)
    if FINISHED not in values:
        return RunSpec(name, _sections(document, keys))
    if len(values) > 1:
        other = next(key for key in values if key != FINISHED)
        raise document.problem((*keys, other), f"a run that takes finished {FINISHED} is not trained; leave it out")
    adapters = values[FINISHED]
    if isinstance(adapters, dict) and adapters and all(_is_adapter(key, item) for key, item in adapters.items()):
        return RunSpec(name, {}, {int(seed): source for seed, source in adapters.items()})
    raise document.problem(
        (*keys, FINISHED), "must be a mapping of seeds to folders or Hub ids of PEFT adapters, e.g. {0: runs/kl}"
    )


def _is_adapter(seed: str, folder: object) -> bool:
    return seed.isdecimal() and isinstance(folder, str) and bool(folder)


def _check(config: CompareConfig) -> None:
    """Refuse what would fail after hours: every recipe is read, and measures are held against the runs."""
    document, measure = config.document, config.measure
    measure.check(document)
    if not document.section("recipe", "model").get("path"):
        raise document.problem(("recipe", "model", "path"), "missing: it is the model that all runs start from")
    for run in config.runs:
        for seed in config.seeds_of(run):
            if not run.adapters:
                config.recipe_for(run, seed, config.output)
                if measure.operator_swap is not None:
                    config.recipe_for(run, seed, config.output, config.swap_changes())
    if measure.sweep is not None and not measure.drift and not measure.margin:
        raise document.problem(("measure", "sweep"), "there is nothing to sweep: measure margin, narrow or general")
    first = config.runs[0]
    if first.adapters and set(first.adapters) != set(config.seeds):
        raise SettingsError(
            f"{document.source}: runs.{first.name}: the first run is what the others are held against, so it needs an "
            f"adapter for every seed ({', '.join(map(str, config.seeds))})"
        )


def _put(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Lay mappings over mappings; anything else replaces what was there."""
    for key, change in changes.items():
        former = values.get(key)
        if isinstance(change, dict) and isinstance(former, dict):
            _put(former, change)
        else:
            values[key] = copy.deepcopy(change)
