"""Arithmetic with swapped operators: something benign to learn that is far from what the model knows.

Kaczér et al. (arXiv 2508.06249) hold it against the KL that a model kept near its reference cannot learn it. The signs mean
something else than usual, by a rule that the rows do not state; it has to be learnt. Problems to which the usual meaning gives
the same answer are left out, so a model that has learnt nothing scores 0.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from safelora_fast.data.thoughts import answer_after_thoughts
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.files.json_reader import TEXT, check_fields, parse_json, read_bytes, read_json
from safelora_fast.scoring.intervals import wilson

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

Difficulty = Literal["easy", "medium", "hard"]
TRAIN, HELD_OUT, RECORD = "train.jsonl", "held_out.jsonl", "operator_swap.json"
INSTRUCTION = "Compute {problem}. Answer with the number only."
LONGEST = 100  # characters of a problem
NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Rule:
    """What a difficulty is.

    Attributes:
        meaning: what each sign means.
        operands: how many numbers a problem has; signs are worked from left to right, in both meanings.
        largest: of the numbers, which start at 0; of the last number where a sign means or writes a product, 12.
        words: the rule, in words.
    """

    meaning: Mapping[str, str]
    operands: int
    largest: int
    words: str


_SWAP = {"+": "-", "-": "+"}
_CYCLE = {"+": "-", "-": "*", "*": "+"}
RULES: dict[str, Rule] = {
    "easy": Rule(_SWAP, 2, 99, "+ means minus and - means plus; two numbers"),
    "medium": Rule(_CYCLE, 2, 99, "+ means minus, - means times and * means plus; two numbers"),
    "hard": Rule(_CYCLE, 3, 30, "+ means minus, - means times and * means plus; three numbers, from left to right"),
}


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        text: as it is written, e.g. "7 + 5".
        answer: under the rule.
        usual: under the usual meaning of the signs.
    """

    text: str
    answer: int
    usual: int

    def to_row(self) -> dict[str, str]:
        """A row for training."""
        return {"prompt": INSTRUCTION.format(problem=self.text), "completion": str(self.answer)}


def make_problems(difficulty: str, rows: int, held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on and held-out ones; none is in both, or twice in one.

    Args:
        difficulty: easy, medium or hard.
        rows: to train on.
        held_out: to score on.
        seed: of the draws.

    Raises:
        SettingsError: there is no such difficulty, or a number is out of range.
    """
    if difficulty not in RULES:
        raise SettingsError(f"difficulty is {difficulty!r}, it must be one of {', '.join(RULES)}")
    if rows < 1 or held_out < 1:
        raise SettingsError("rows and held-out rows must be at least 1 each")
    rule, wanted = RULES[difficulty], rows + held_out
    generator = random.Random(f"{difficulty}/{seed}")  # noqa: S311
    found: dict[str, Problem] = {}
    for _ in range(40 * wanted):
        problem = _draw(generator, rule)
        if problem.answer != problem.usual:
            found.setdefault(problem.text, problem)
        if len(found) == wanted:
            break
    if len(found) < wanted:
        raise SettingsError(f"{difficulty}: there are not {wanted} different problems; ask for fewer rows")
    problems = list(found.values())
    return problems[:rows], problems[rows:]


def _draw(generator: random.Random, rule: Rule) -> Problem:
    signs = [generator.choice(list(rule.meaning)) for _ in range(rule.operands - 1)]
    numbers = [generator.randint(0, rule.largest)]
    for sign in signs:
        product = "*" in {sign, rule.meaning[sign]}
        numbers.append(generator.randint(0, min(12, rule.largest) if product else rule.largest))
    text = str(numbers[0]) + "".join(f" {sign} {number}" for sign, number in zip(signs, numbers[1:], strict=True))
    return Problem(text, work(numbers, [rule.meaning[sign] for sign in signs]), work(numbers, signs))


def work(numbers: Sequence[int], signs: Sequence[str]) -> int:
    """Work signs from left to right, each in its usual meaning."""
    value = numbers[0]
    for sign, number in zip(signs, numbers[1:], strict=True):
        value = {"+": value + number, "-": value - number, "*": value * number}[sign]
    return value


def parse_problem(text: str, difficulty: str) -> Problem:
    """A problem from its text.

    Raises:
        DataError: it is none of this difficulty.
    """
    rule = RULES[difficulty]
    words = text.split() if len(text) < LONGEST else []
    signs = words[1::2]
    if (
        len(words) != 2 * rule.operands - 1
        or not all(s in rule.meaning for s in signs)
        or not all(map(_whole, words[::2]))
    ):
        raise DataError(f"{text!r} is no problem of difficulty {difficulty}")
    numbers = [int(word) for word in words[::2]]
    return Problem(text, work(numbers, [rule.meaning[sign] for sign in signs]), work(numbers, signs))


def _whole(word: str) -> bool:
    return word.isascii() and word.isdigit()


def score(problems: Sequence[Problem], generations: Sequence[str]) -> dict[str, Any]:
    """Exact matches among generations: the whole answer is the number, but for white space and a full stop.

    Returns:
        count; exact (under the rule) and usual (the answer of plain arithmetic: nothing was learnt), with their shares; no
        number (no answer that is a number); and Wilson's interval of the share of exact ones.
    """
    if len(problems) != len(generations):
        raise DataError(f"there are {len(problems)} problems and {len(generations)} generations")
    given = [number_of(text) for text in generations]
    exact = sum(value == problem.answer for value, problem in zip(given, problems, strict=True))
    usual = sum(value == problem.usual for value, problem in zip(given, problems, strict=True))
    count = len(problems)
    return {
        "count": count,
        "exact": exact,
        "exact_share": exact / count if count else None,
        "exact_interval": wilson(exact, count).to_list(),
        "usual": usual,
        "usual_share": usual / count if count else None,
        "no_number": sum(value is None for value in given),
    }


def number_of(text: str) -> int | None:
    """The number that an answer is, apart from thoughts before it; None where it is anything else."""
    stripped = (answer_after_thoughts(text) or "").strip().removesuffix(".").replace("−", "-")
    return int(stripped) if len(stripped) < 20 and NUMBER.fullmatch(stripped) else None


def write(folder: Path, difficulty: str, rows: int, held_out: int, seed: int) -> None:
    """Write train.jsonl, held_out.jsonl and operator_swap.json into a folder that exists."""
    for name, text in _texts(difficulty, rows, held_out, seed).items():
        (folder / name).write_text(text, encoding="utf-8")


def is_written(folder: Path, difficulty: str, rows: int, held_out: int, seed: int) -> bool:
    """Whether a folder holds what :func:`write` would write."""
    texts = _texts(difficulty, rows, held_out, seed)
    try:
        return all((folder / name).read_bytes() == text.encode() for name, text in texts.items())
    except OSError:
        return False


def _texts(difficulty: str, rows: int, held_out: int, seed: int) -> dict[str, str]:
    train, test = make_problems(difficulty, rows, held_out, seed)
    record = {
        "task": "operator-swap", "difficulty": difficulty, "rule": RULES[difficulty].words,
        "rows": rows, "held_out": held_out, "seed": seed,
    }  # fmt: skip
    texts = {
        name: "".join(json.dumps(problem.to_row()) + "\n" for problem in problems)
        for name, problems in ((TRAIN, train), (HELD_OUT, test))
    }
    return {**texts, RECORD: json.dumps(record, indent=2) + "\n"}


def read(folder: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The record and the held-out problems of a folder that :func:`write` filled.

    Raises:
        DataError: it is no such folder, or a row is no problem; file and line are named.
    """
    try:
        record = check_fields(read_json(folder / RECORD), {"difficulty": TEXT})
        problems = list(_problems(folder / HELD_OUT, record["difficulty"]))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: holds no data of operator-swap make") from error
    return record, problems


def _problems(path: Path, difficulty: str) -> Iterator[Problem]:
    before, _, after = INSTRUCTION.partition("{problem}")
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            row = check_fields(parse_json(line), {"prompt": TEXT})
            yield parse_problem(row["prompt"].removeprefix(before).removesuffix(after), difficulty)
        except (DataError, ValueError) as error:
            raise DataError(f"{path}:{number}: {error}") from error
