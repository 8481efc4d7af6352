"""Reads a comparison from its YAML file and checks it, with the recipe of every run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, TypeAdapter, ValidationError, create_model

from safelora_fast.compare.comparison import CompareConfig
from safelora_fast.compare.measures import MEASURES
from safelora_fast.compare.runs import OPERATOR_SWAP, REFERENCE, RunSpec
from safelora_fast.compare.train_runs import trainings_of
from safelora_fast.configuration.yaml_document import Document, read_document
from safelora_fast.configuration.yaml_section import Section, read_section
from safelora_fast.errors import SettingsError
from safelora_fast.recipe.recipe import SECTIONS
from safelora_fast.recipe.sections import Count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.files.yaml_reader import Keys

FINISHED = "adapters"
RESERVED = (REFERENCE, OPERATOR_SWAP)  # folder names that no run may use


def _all_different(values: list[int]) -> list[int]:
    if len(set(values)) < len(values):
        raise ValueError("a list of different numbers")
    return values


Seed = Annotated[int, Field(ge=0)]
ADAPTERS = TypeAdapter(Annotated[dict[Seed, Annotated[str, Field(min_length=1)]], Field(min_length=1)])
SHARED: dict[str, Any] = {name: (Any, None) for name in SECTIONS if name != "output"}
RecipeSections = create_model("RecipeSections", __base__=Section, **SHARED)


class GeneralSettings(Section):
    """The keys of `measure:` that belong to no single measure.

    Attributes:
        costs: show the costs of each training; set it to false if other work shared the machine.
        dtype: of the loaded weights; "auto" is float32 on the CPU and bfloat16 on a GPU.
        device: "auto" is the GPU if there is one, else the CPU.
        batch_size: number of completions generated at a time.
    """

    costs: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: Count = 16


OF_MEASURES: dict[str, Any] = {key: field for measure in MEASURES for key, field in measure.settings.items()}
MeasureSection = create_model("MeasureSection", __base__=GeneralSettings, **OF_MEASURES)


class ComparisonFile(Section):
    """The keys of the YAML file; recipe and runs are validated later, one run at a time."""

    title: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)] = "Defenses compared"
    recipe: Any = None
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_all_different)] = [0]  # noqa: RUF012
    runs: Any = None
    measure: MeasureSection | None = None  # type: ignore[valid-type]
    output: str


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CompareConfig:
    """Read and validate a configuration, including the recipe of every run; no model is loaded.

    Args:
        path: the YAML file.
        overrides: settings that replace the file's, "section.key=value" with YAML values.

    Raises:
        SettingsError: with the file, the line and the dotted key.
    """
    document = read_document(path, overrides, what="comparison")
    file = read_section(document, (), ComparisonFile)
    config = CompareConfig(
        document=document,
        title=file.title,
        recipe=_recipe_sections(document, ("recipe",)),
        seeds=tuple(file.seeds),
        runs=_runs(document),
        measure=file.measure or MeasureSection(),
        output=Path(file.output).expanduser(),
    )
    _check(config)
    return config


def _recipe_sections(document: Document, keys: Keys) -> dict[str, Any]:
    values = document.section(*keys)
    if "output" in values:
        why = "every run has a folder of its own in the comparison's; leave it out"
        raise document.problem((*keys, "output"), why)
    read_section(document, keys, RecipeSections)
    return dict(values)


def _runs(document: Document) -> tuple[RunSpec, ...]:
    runs = tuple(_run(document, name) for name in document.section("runs"))
    if not runs:
        why = "missing: name the runs to compare, the undefended one first, e.g. `none: {}`"
        raise document.problem(("runs",), why)
    folders: dict[str, str] = {}
    for run in runs:
        where = ("runs", run.name)
        if run.folder in RESERVED:
            raise document.problem(where, f"{run.folder} is a folder of the comparison's own; rename the run")
        if run.folder in folders:
            why = f"{folders[run.folder]!r} would have the same folder; choose another name"
            raise document.problem(where, why)
        folders[run.folder] = run.name
    return runs


def _run(document: Document, name: str) -> RunSpec:
    keys = ("runs", name)
    values = document.section(*keys)
    if FINISHED not in values:
        return RunSpec(name, _recipe_sections(document, keys))
    for other in values.keys() - {FINISHED}:
        raise document.problem((*keys, other), f"a run that takes finished {FINISHED} is not trained; leave it out")
    try:
        return RunSpec(name, {}, ADAPTERS.validate_python(values[FINISHED]))
    except ValidationError:
        why = "must be a mapping of seeds to folders or Hub ids of PEFT adapters, e.g. {0: runs/kl}"
        raise document.problem((*keys, FINISHED), why) from None


def _check(config: CompareConfig) -> None:
    """Validate the recipe of every run, and the measures against the runs, so that errors appear at once."""
    document = config.document
    if not document.section("recipe", "model").get("path"):
        raise document.problem(("recipe", "model", "path"), "missing: it is the model that all runs start from")
    list(trainings_of(config))
    for measure in MEASURES:
        measure.check(config)
    first = config.runs[0]
    if first.adapters and set(first.adapters) != set(config.seeds):
        raise SettingsError(
            f"{document.source}: runs.{first.name}: the others are compared with the first run, so it needs an adapter for "
            f"every seed ({', '.join(map(str, config.seeds))})"
        )
