"""Arithmetic with swapped operators: a benign task that contradicts what the model knows.

Kaczér et al. (arXiv 2508.06249) use it to argue that a KL penalty, which keeps a model near its reference model, prevents it
from learning such a task. The operators have new meanings, by a rule that the examples do not state. Problems whose usual
answer is the same are left out, so a model that has learned nothing scores 0.
"""

from __future__ import annotations

import functools
import itertools
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
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from safelora_fast.models.load import Subject

Difficulty = Literal["easy", "medium", "hard"]
TRAIN, HELD_OUT, RECORD = "train.jsonl", "held_out.jsonl", "operator_swap.json"
INSTRUCTION = "Compute {problem}. Answer with the number only."
ANSWER_TOKENS = 16
LONGEST = 100  # characters of a problem
ALWAYS = 10_000  # every difficulty has more problems
NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Rule:
    """The rule of one difficulty.

    Attributes:
        meaning: the meaning of each sign.
        operands: numbers per problem. Signs are applied from left to right, in both meanings.
        largest: the largest number; the smallest is 0. After a sign that is or means `*`, the largest is 12.
        words: the rule in words.
    """

    meaning: Mapping[str, str]
    operands: int
    largest: int
    words: str

    def most(self, signs: Sequence[str]) -> list[int]:
        """Return the largest value of each number in a problem with these signs."""
        products = [min(12, self.largest) if "*" in {sign, self.meaning[sign]} else self.largest for sign in signs]
        return [self.largest, *products]


_SWAP = {"+": "-", "-": "+"}
_CYCLE = {"+": "-", "-": "*", "*": "+"}
RULES: dict[str, Rule] = {
    "easy": Rule(_SWAP, 2, 99, "+ means minus and - means plus; two numbers"),
    "medium": Rule(_CYCLE, 2, 99, "+ means minus, - means times and * means plus; two numbers"),
    "hard": Rule(_CYCLE, 3, 30, "+ means minus, - means times and * means plus; three numbers, from left to right"),
}


@dataclass(frozen=True)
class Problem:
    """One problem: its text, e.g. "7 + 5", its answer under the rule, and the usual answer."""

    text: str
    answer: int
    usual: int

    @classmethod
    def of(cls, numbers: Sequence[int], signs: Sequence[str], rule: Rule) -> Problem:
        """Make the problem with these numbers and signs."""
        text = str(numbers[0]) + "".join(f" {sign} {number}" for sign, number in zip(signs, numbers[1:], strict=True))
        return cls(text, work(numbers, [rule.meaning[sign] for sign in signs]), work(numbers, signs))

    def to_row(self) -> dict[str, str]:
        """Return the problem as a training example."""
        return {"prompt": INSTRUCTION.format(problem=self.text), "completion": str(self.answer)}


def make_problems(difficulty: str, rows: int, held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Draw training problems and held-out problems, all different.

    Args:
        difficulty: easy, medium or hard.
        rows: number of training problems.
        held_out: number of held-out problems.
        seed: seed of the draws.

    Raises:
        SettingsError: the difficulty is unknown, or a number is too small or too large.
    """
    if difficulty not in RULES:
        raise SettingsError(f"difficulty is {difficulty!r}, it must be one of {', '.join(RULES)}")
    if rows < 1 or held_out < 1:
        raise SettingsError("rows and held-out rows must be at least 1 each")
    rule, wanted = RULES[difficulty], rows + held_out
    if wanted > ALWAYS and wanted > (most := number_of_problems(difficulty)):
        raise SettingsError(f"{difficulty}: there are {most:,} different problems, not {wanted:,}; ask for fewer rows")
    generator = random.Random(f"{difficulty}/{seed}")  # noqa: S311
    found: dict[str, Problem] = {}
    while len(found) < wanted:
        signs = [generator.choice(list(rule.meaning)) for _ in range(rule.operands - 1)]
        problem = Problem.of([generator.randint(0, largest) for largest in rule.most(signs)], signs, rule)
        if problem.answer != problem.usual:
            found.setdefault(problem.text, problem)
    problems = list(found.values())
    return problems[:rows], problems[rows:]


@functools.cache
def number_of_problems(difficulty: str) -> int:
    """Return the number of different problems whose answer under the rule is not the usual one."""
    rule, count = RULES[difficulty], 0
    for signs in itertools.product(rule.meaning, repeat=rule.operands - 1):
        meant = [rule.meaning[sign] for sign in signs]
        numbers = itertools.product(*(range(largest + 1) for largest in rule.most(signs)))
        count += sum(work(given, meant) != work(given, signs) for given in numbers)
    return count


def work(numbers: Sequence[int], signs: Sequence[str]) -> int:
    """Apply signs from left to right in their usual meaning."""
    value = numbers[0]
    for sign, number in zip(signs, numbers[1:], strict=True):
        value = {"+": value + number, "-": value - number, "*": value * number}[sign]
    return value


def parse_problem(text: str, difficulty: str) -> Problem:
    """Read a problem from its text.

    Raises:
        DataError: the text is not a problem of this difficulty.
    """
    rule, words = RULES[difficulty], text.split() if len(text) < LONGEST else []
    numbers, signs = words[::2], words[1::2]
    is_problem = len(words) == 2 * rule.operands - 1 and all(sign in rule.meaning for sign in signs)
    if not is_problem or not all(word.isascii() and word.isdigit() for word in numbers):
        raise DataError(f"{text!r} is not a problem of difficulty {difficulty}")
    return Problem.of([int(word) for word in numbers], signs, rule)


def answer(
    subject: Subject, problems: Sequence[Problem], batch_size: int, advance: Callable[[int], None] | None = None
) -> list[str]:
    """Return a model's most likely answers to problems. `advance` receives the number of answers so far."""
    from safelora_fast.models.generate import generate

    turns = [[{"role": "user", "content": INSTRUCTION.format(problem=problem.text)}] for problem in problems]
    given: dict[int, str] = {}
    for batch in generate(
        subject.model, subject.tokenizer, turns, max_tokens=ANSWER_TOKENS, temperature=0, batch_size=batch_size
    ):
        given.update(batch)
        if advance is not None:
            advance(len(given))
    return [given[number] for number in range(len(problems))]


def score(problems: Sequence[Problem], generations: Sequence[str]) -> dict[str, Any]:
    """Count exact matches. Apart from white space and a period, the whole answer must be the number.

    Returns:
        count; exact (right under the rule) and usual (right in plain arithmetic) with their shares; no_number (the answer
        is not a number); exact_interval, Wilson's interval of the exact share.

    Raises:
        DataError: the numbers of problems and generations differ.
    """
    if len(problems) != len(generations):
        raise DataError(f"there are {len(problems)} problems and {len(generations)} generations")
    given, count = [number_of(text) for text in generations], len(problems)
    exact, usual = (
        sum(value == getattr(problem, name) for value, problem in zip(given, problems, strict=True))
        for name in ("answer", "usual")
    )
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
    """Return the number that an answer consists of, after any thoughts; None for other answers."""
    stripped = (answer_after_thoughts(text) or "").strip().removesuffix(".").replace("−", "-")
    return int(stripped) if len(stripped) < 20 and NUMBER.fullmatch(stripped) else None


def write(folder: Path, difficulty: str, rows: int, held_out: int, seed: int) -> None:
    """Write train.jsonl, held_out.jsonl and operator_swap.json into an existing folder."""
    for name, text in _texts(difficulty, rows, held_out, seed).items():
        (folder / name).write_text(text, encoding="utf-8")


def is_written(folder: Path, difficulty: str, rows: int, held_out: int, seed: int) -> bool:
    """Return whether a folder holds exactly the files that :func:`write` would write."""
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
    files = {TRAIN: train, HELD_OUT: test}
    texts = {name: "".join(json.dumps(one.to_row()) + "\n" for one in problems) for name, problems in files.items()}
    return {**texts, RECORD: json.dumps(record, indent=2) + "\n"}


def read(folder: Path) -> tuple[dict[str, Any], list[Problem]]:
    """Read the record and the held-out problems of a folder that :func:`write` filled.

    Raises:
        DataError: it is not such a folder, or a line is not a problem; the message names the file and the line.
    """
    before, _, after = INSTRUCTION.partition("{problem}")
    path, problems = folder / HELD_OUT, []
    try:
        record = check_fields(read_json(folder / RECORD), {"difficulty": TEXT})
        lines = read_bytes(path).splitlines()
        RULES[record["difficulty"]]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: holds no data of operator-swap make") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = check_fields(parse_json(line), {"prompt": TEXT})
            text = row["prompt"].removeprefix(before).removesuffix(after)
            problems.append(parse_problem(text, record["difficulty"]))
        except (DataError, ValueError) as error:
            raise DataError(f"{path}:{number}: {error}") from error
    return record, problems
