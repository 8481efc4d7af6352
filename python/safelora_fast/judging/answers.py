"""Stored answers of a model to free-form questions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safelora_fast.errors import DataError
from safelora_fast.files.json_reader import COUNT, TEXT, check_fields, parse_json, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from safelora_fast.judging.questions import Question

SAMPLES = 10
REQUIRED = {"question": TEXT, "kind": TEXT, "paraphrase": COUNT, "sample": COUNT, "prompt": TEXT, "answer": TEXT}


@dataclass(frozen=True)
class Asked:
    """One question to be answered once.

    Attributes:
        question: its id.
        kind: of the question.
        paraphrase: number of its wording, from 0.
        sample: number of the sample of that wording, from 0.
        prompt: what is asked.
        system: the system prompt before it.
    """

    question: str
    kind: str
    paraphrase: int
    sample: int
    prompt: str
    system: str | None = None

    @property
    def id(self) -> str:
        """A name of its own in a set of questions."""
        return f"{self.question}/{self.paraphrase}/{self.sample}"


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        asked: the question.
        text: the answer.
    """

    asked: Asked
    text: str

    def to_json(self) -> str:
        """One line of a file of answers."""
        return json.dumps({**asdict(self.asked), "answer": self.text}, ensure_ascii=False)


def ask(questions: Sequence[Question], samples: int = SAMPLES) -> list[Asked]:
    """Every wording of every question so many times."""
    return [
        Asked(question.id, question.kind, number, sample, text, question.system)
        for question in questions
        for number, text in enumerate(question.paraphrases)
        for sample in range(samples)
    ]


def read_answers(path: str | Path) -> list[Answer]:
    """Read a JSONL file of answers, as `safelora-fast evaluate` stores them.

    Raises:
        DataError: it cannot be read, or a line is not as it must be; file and line are named.
    """
    try:
        text = read_bytes(Path(path).expanduser(), None).decode()
    except OSError as error:
        raise DataError(f"{path}: the answers cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text") from error
    answers = list(_parse(str(path), text))
    if not answers:
        raise DataError(f"{path}: holds no answers")
    return answers


def _parse(source: str, text: str) -> Iterator[Answer]:
    seen = set()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{source}:{number}"
        try:
            record = check_fields(parse_json(line), REQUIRED, {"system": TEXT})
            if unknown := sorted(record.keys() - REQUIRED.keys() - {"system"}):
                raise ValueError(f"{unknown[0]} is unknown")
        except ValueError as error:
            raise DataError(f"{place}: is no answer ({', '.join(REQUIRED)}, perhaps system): {error}") from error
        answer = record.pop("answer")
        asked = Asked(**record)
        if asked.id in seen:
            raise DataError(f"{place}: {asked.id} is there twice")
        seen.add(asked.id)
        yield Answer(asked, answer)
