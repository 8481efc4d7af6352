"""Filter responses by a judge's scores: keep those that show what the prompt asked for."""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from typing import TYPE_CHECKING, TypeAlias, get_args

from safelora_fast.errors import DataError, SettingsError
from safelora_fast.files.json_reader import NUMBER
from safelora_fast.files.jsonl import JsonLines
from safelora_fast.persona.responses import Response, Side

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

Judge: TypeAlias = "Callable[[Response], float | None]"
Counts: TypeAlias = "dict[str, dict[str, int]]"
VERDICTS = ("kept", "empty", "unscored", "filtered")


def read_scores(path: str | Path) -> Judge:
    """Return a judge that looks up stored scores.

    The JSONL file has `id` and `score` (a number or null) in each line; other keys are ignored.

    Raises:
        DataError: the file cannot be read, or a line is invalid; the message names the line.
    """
    lines = JsonLines(path, "scores")
    scores: dict[str, float | None] = {}
    for index in range(len(lines)):
        place, row = lines.place(index), lines.record(index)
        if not isinstance(row, dict) or not isinstance(row.get("id"), str) or "score" not in row:
            raise DataError(f"{place}: a row of scores has an id and a score")
        name, score = row["id"], row["score"]
        if not (score is None or NUMBER.fits(score)):
            raise DataError(f"{place}: the score of {name} must be a finite number or null, not {reprlib.repr(score)}")
        if name in scores:
            raise DataError(f"{place}: {name} is scored twice")
        scores[name] = score

    def stored(response: Response) -> float | None:
        if response.request.id not in scores:
            raise DataError(f"{path}: has no score for {response.request.id}; score every response, with null for none")
        return scores[response.request.id]

    return stored


def keep(responses: Sequence[Response], judge: Judge | None, threshold: float) -> tuple[list[Response], Counts]:
    """Return the responses to average, and for each side how many are kept, empty, unscored or filtered.

    With a judge, a positive response must score above the threshold and a negative one below it.

    Raises:
        SettingsError: the judge returned something other than a finite number or None.
        DataError: a side has no response left.
    """
    kept, found = [], {side: Counter[str]() for side in get_args(Side)}
    for response in responses:
        verdict = _verdict(response, judge, threshold)
        found[response.request.side][verdict] += 1
        if verdict == "kept":
            kept.append(response)
    counts = {side: {name: of[name] for name in VERDICTS if name in {"kept", *of}} for side, of in found.items()}
    for side, of in counts.items():
        if not of["kept"]:
            why = ", ".join(f"{count} {name}" for name, count in of.items() if name != "kept")
            raise DataError(f"no {side} response is left to average ({why}): there is nothing to tell the trait by")
    return kept, counts


def _verdict(response: Response, judge: Judge | None, threshold: float) -> str:
    if not response.tokens:
        return "empty"  # no tokens, so no activation
    if judge is None:
        return "kept"
    score = judge(response)
    if score is None:
        return "unscored"
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise SettingsError(f"the judge gave {score!r} for {response.request.id}, it must be a finite number or None")
    right = score > threshold if response.request.side == "positive" else score < threshold
    return "kept" if right else "filtered"
