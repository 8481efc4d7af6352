"""Texts of the report that are not values: the set-up, and the conclusions from the values."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.model_card import shown_model, shown_paths
from safelora_fast.compare.measures.margin import MARGIN_RISE
from safelora_fast.compare.statistics import pool, pool_differences
from safelora_fast.compare.words import format_ends, words
from safelora_fast.recipe.run_metrics import machine, versions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from safelora_fast.compare.report import Column
    from safelora_fast.compare.runs import RunSpec
    from safelora_fast.compare.statistics import Outcome
    from safelora_fast.compare.workbench import Workbench

SECTIONS = ("defenses", "data", "training", "lora", "model", "monitors")
SYMBOLS = {"weight": "λ", "threshold": "τ", "coefficient": "α"}
PATHS = ("path", "subspace", "vector", "without_answer", "too_long")  # the recipe shows them
UNITS = {"%": "points", "nats": "nats a token"}


def facts_of(bench: Workbench, records: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> dict[str, str]:
    """Return the set-up by label, in page order; only the last part of local paths is shown.

    Args:
        bench: the workbench, which has the configuration.
        records: records of the trainings.
        counts: number of measured examples, by set name.
    """
    config, measure = bench.config, bench.config.measure
    steps = sorted({record["steps"] for record in records if "steps" in record})
    rows = {name: f"{count} of {bench.row_sources[name]}" for name, count in counts.items()}
    swap = measure.operator_swap
    swap_seeds = config.seeds if swap is None or swap.seeds is None else swap.seeds
    facts = {
        "model": shown_model(bench.settings.model),
        "task": str(config.recipe.get("data", {}).get("path", "")),
        "seeds": _list(config.seeds),
        "optimizer steps": " to ".join(dict.fromkeys(map(str, (steps[0], steps[-1])))) if steps else "",
        "narrow rows": rows.get("narrow", ""),
        "general rows": rows.get("general", ""),
        "operator swap": "" if swap is None else words().operator_swap(swap, _list(swap_seeds)),
        "judge": "" if measure.judge is None else measure.judge.model,
        "SafeLoRA's base": "" if measure.sweep is None else shown_model(measure.sweep.base),
        "measured in": f"{bench.settings.dtype} on the {bench.settings.device}",
        "machine": "; ".join(_distinct(record.get("machine") for record in records) or [machine()]),
        "versions": "; ".join(map(_versions, _distinct(record.get("versions") for record in records) or [versions()])),
    }
    return {label: shown_paths(text) for label, text in facts.items() if text}


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Return the different values in order, without None: the machines and versions that runs were trained with."""
    found: list[Any] = []
    for value in values:
        if value is not None and value not in found:
            found.append(value)
    return found


def _versions(packages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def setting_of(spec: RunSpec) -> str:
    """Return the changes of a run to the recipe as text, e.g. "kl (λ 0.1)"."""
    return "finished adapters" if spec.adapters else ", ".join(_settings(spec.changes))


def _settings(values: Mapping[str, Any]) -> list[str]:
    said: list[str] = []
    for key, value in values.items():
        if key in PATHS:
            continue
        if isinstance(value, dict):
            inner = _settings(value)
            said += inner if key in SECTIONS else [f"{key} ({', '.join(inner)})" if inner else key]
        else:
            shown = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
            shown = f"{shown:g}" if isinstance(shown, int | float) else shown
            said.append(f"{SYMBOLS.get(key, key)} {shown}")
    return said


def conclusions(
    columns: Sequence[Column], outcomes: Mapping[str, Mapping[str, Mapping[int, Outcome]]], *, seeds: int
) -> tuple[str, ...]:
    """Return the conclusions from the values, one sentence each.

    Args:
        columns: columns of the report.
        outcomes: results by defense, column key and seed; the others are compared with the first defense.
        seeds: number of seeds.
    """
    (first, of_first), *others = outcomes.items()
    sentences = []
    margin = list(of_first.get(MARGIN_RISE.key, {}).values())
    if margin:
        pooled = pool(margin)
        low, high = pooled.interval.low, pooled.interval.high
        sentences.append(words().margin(first, format_ends(pooled.value, low, high, "nats"), low, high))
    known = [column for column in columns if column.key in of_first]
    compared = 0
    for name, own in others if known else ():
        if not any(own.values()):
            continue  # not done yet, as its cells say
        said: dict[str, list[str]] = defaultdict(list)
        for column in known:
            verdict, text = _difference(own.get(column.key, {}), of_first[column.key], column)
            said[verdict].append(text)
        compared += len(said["clear"]) + len(said["unclear"])
        sentences.append(words().differences(name, first, said, all_titles=[column.title for column in known]))
    if seeds == 1:
        sentences.append(words().one_seed())
    if compared > 1:
        sentences.append(words().by_chance(compared))
    return tuple(sentences)


def _difference(own: Mapping[int, Outcome], first: Mapping[int, Outcome], column: Column) -> tuple[str, str]:
    """Return the verdict on a difference, and the text for it.

    The verdict is "clear", "unclear", "unknown" (the error is unknown) or "apart" (no seed in common). If one run lacks
    a seed that the other has, the table shows means over other seeds, so the text names the common seeds.
    """
    pooled = pool_differences(own, first, share=column.unit == "%")
    if pooled is None:
        return "apart", column.title
    seeds = [] if own.keys() == first.keys() else sorted(own.keys() & first.keys())
    low, high = pooled.interval.low, pooled.interval.high
    if math.isnan(low) or low <= 0 <= high:
        return "unknown" if math.isnan(low) else "unclear", words().with_seeds(column.title, seeds)
    near, far = sorted((abs(low), abs(high)))
    ends = format_ends(abs(pooled.value), near, far, column.unit)
    way, unit = "higher" if pooled.value > 0 else "lower", UNITS.get(column.unit, column.unit)
    return "clear", words().clear_difference(column.title, way, ends, unit, seeds)
