"""What a reader of the figures must know beside them."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.model_card import shown_model, shown_paths
from safelora_fast.recipe.run_metrics import versions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.compare.config import CompareConfig, RunSpec
    from safelora_fast.compare.shared_models import Workbench

SECTIONS = ("defenses", "data", "training", "lora", "model", "monitors")
SYMBOLS = {"weight": "λ", "threshold": "τ", "coefficient": "α"}
PATHS = ("path", "subspace", "vector", "without_answer", "too_long")  # the recipe has them


def facts_of(config: CompareConfig, bench: Workbench, records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By label, in the order in which they are shown; of paths of this machine the last part.

    Args:
        config: the comparison.
        bench: what its runs are measured with.
        records: of their trainings.
    """
    steps = sorted({record["steps"] for record in records if "steps" in record})
    measure = config.measure
    facts = {
        "model": shown_model(bench.settings.model),
        "task": str(config.recipe.get("data", {}).get("path", "")),
        "seeds": ", ".join(map(str, config.seeds)),
        "optimiser steps": " to ".join(dict.fromkeys(map(str, (steps[0], steps[-1])))) if steps else "",
        "narrow rows": _rows(bench, "narrow"),
        "general rows": _rows(bench, "general"),
        "operator swap": "" if measure.operator_swap is None else _swap(config),
        "judge": "" if measure.judge is None else measure.judge.model,
        "SafeLoRA's base": "" if measure.sweep is None else shown_model(measure.sweep.base),
        "measured in": f"{bench.settings.dtype} on the {bench.settings.device}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    return {label: shown_paths(text) for label, text in facts.items() if text}


def setting_of(run: RunSpec) -> str:
    """What a run changes in the recipe, in words: λ 0.1, say."""
    if run.adapters:
        return "finished adapters"
    return ", ".join(_words(run.changes)) if run.changes else ""


def _words(values: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for key, value in values.items():
        if key in PATHS:
            continue
        if key in SECTIONS and isinstance(value, dict):
            words += _words(value)
        elif isinstance(value, dict):
            inner = ", ".join(_words(value))
            words.append(f"{key} ({inner})" if inner else key)
        else:
            words.append(f"{SYMBOLS.get(key, key)} {_plain(value)}")
    return words


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _rows(bench: Workbench, name: str) -> str:
    rows = bench.rows.get(name)
    return "" if rows is None else f"{len(rows.rows)} of {rows.source}"


def _swap(config: CompareConfig) -> str:
    swap = config.measure.operator_swap
    assert swap is not None  # noqa: S101
    seeds = config.seeds if swap.seeds is None else swap.seeds
    return f"{swap.difficulty}, {swap.rows} rows, {swap.held_out} held out, seeds {', '.join(map(str, seeds))}"
