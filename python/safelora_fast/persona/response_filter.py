"""Which responses show what they were asked for: by a judge's score, where there is one."""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias, get_args

from safelora_fast.errors import DataError, SettingsError
from safelora_fast.files.json_reader import NUMBER, parse_json, read_bytes
from safelora_fast.persona.responses import Response, Side

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Judge: TypeAlias = "Callable[[Response], float | None]"
Counts: TypeAlias = "dict[str, dict[str, int]]"


def read_scores(path: str | Path) -> Judge:
    """A judge that gives stored scores: a JSONL file of rows with `id` and `score` (a number, or null); other keys are left.

    Raises:
        DataError: the file cannot be read, or a row is not as it must be; file and line are named.
    """
    try:
        lines = read_bytes(path, None).split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: the scores cannot be read: {error.strerror}") from error
    scores: dict[str, float | None] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        if not isinstance(row, Mapping) or not isinstance(row.get("id"), str) or "score" not in row:
            raise DataError(f"{path}:{number}: a row of scores has an id and a score")
        score = row["score"]
        if not (score is None or NUMBER.fits(score)):
            raise DataError(
                f"{path}:{number}: the score of {row['id']} must be a finite number or null, not {reprlib.repr(score)}"
            )
        if row["id"] in scores:
            raise DataError(f"{path}:{number}: {row['id']} is scored twice")
        scores[row["id"]] = score

    def stored(response: Response) -> float | None:
        if response.request.id not in scores:
            raise DataError(f"{path}: has no score for {response.request.id}; score every response, with null for none")
        return scores[response.request.id]

    return stored


def keep(responses: Sequence[Response], judge: Judge | None, threshold: float) -> tuple[list[Response], Counts]:
    """The responses that count, and for each side how many there were, and why the others do not count.

    Without tokens a response has no activation. With a judge, a positive response must score above the threshold and a
    negative one below it; those without a score are left out.

    Raises:
        SettingsError: the judge gives something else than a finite number or None.
        DataError: a side has no response left.
    """
    kept, counts = [], {side: Counter[str]() for side in get_args(Side)}
    for response in responses:
        verdict = _verdict(response, judge, threshold)
        counts[response.request.side][verdict] += 1
        if verdict == "kept":
            kept.append(response)
    names = ("kept", "empty", "unscored", "filtered")
    told = {side: {name: found[name] for name in names if name in {"kept", *found}} for side, found in counts.items()}
    for side, found in told.items():
        if not found["kept"]:
            why = ", ".join(f"{count} {name}" for name, count in found.items() if name != "kept")
            raise DataError(f"no {side} response is left to average ({why}): there is nothing to tell the trait by")
    return kept, told


def _verdict(response: Response, judge: Judge | None, threshold: float) -> str:
    if not response.tokens:
        return "empty"
    if judge is None:
        return "kept"
    score = judge(response)
    if score is None:
        return "unscored"
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise SettingsError(f"the judge gave {score!r} for {response.request.id}, it must be a finite number or None")
    right = score > threshold if response.request.side == "positive" else score < threshold
    return "kept" if right else "filtered"
