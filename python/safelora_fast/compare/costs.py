"""What each run's training cost, from the record that it left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.compare.report import Column

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

GIGABYTE = 1e9


def _step(record: Mapping[str, Any], _first: Mapping[str, Any]) -> float | None:
    return record.get("step_seconds")


def _relative(record: Mapping[str, Any], first: Mapping[str, Any]) -> float | None:
    own, other = record.get("step_seconds"), first.get("step_seconds")
    return own / other if own and other else None


def _whole(record: Mapping[str, Any], _first: Mapping[str, Any]) -> float | None:
    return record.get("seconds")


def _memory(record: Mapping[str, Any], _first: Mapping[str, Any]) -> float | None:
    peaks = record.get("peak_bytes") or {}
    peak = peaks.get("gpu") or peaks.get("resident")
    return peak / GIGABYTE if peak else None


# From a run's record, and that of the first run of the same seed, to a figure.
COSTS: tuple[tuple[Column, Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]], ...] = (
    (Column("step", "cost", "step", "s", "lower", "Median seconds of an optimiser step."), _step),
    (
        Column(
            "relative", "cost", "beside first", "×", "lower", "A step beside one of the first run with the same seed."
        ),
        _relative,
    ),
    (
        Column("seconds", "cost", "training", "s", "lower", "Seconds of the training, from its start to its end."),
        _whole,
    ),
    (
        Column(
            "memory",
            "cost",
            "peak memory",
            "GB",
            "lower",
            "Peak of the training's own process: on the GPU, else resident.",
        ),
        _memory,
    ),
)
