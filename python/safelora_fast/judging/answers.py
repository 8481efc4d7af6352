"""A model's stored answers to free-form questions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from safelora_fast.errors import DataError
from safelora_fast.files.json_reader import TEXT, check_fields, parse_as
from safelora_fast.files.jsonl import JsonLines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.judging.questions import Question

SAMPLES = 10


@dataclass(frozen=True)
class Asked:
    """A request for one answer to one paraphrase of a question.

    Attributes:
        question: id of the question.
        kind: kind of the question.
        paraphrase: index of the paraphrase.
        sample: index of the sample of that paraphrase.
        prompt: text of the paraphrase.
        system: system prompt, if any.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    question: str
    kind: str
    paraphrase: int
    sample: int
    prompt: str
    system: str | None = None

    @property
    def id(self) -> str:
        """The id of the answer, unique within a set of questions."""
        return f"{self.question}/{self.paraphrase}/{self.sample}"

    @property
    def turns(self) -> list[dict[str, str]]:
        """The chat messages that the model answers."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Answer:
    """One answer of a model."""

    asked: Asked
    text: str

    def to_row(self) -> dict[str, Any]:
        """Return the record that a file of answers holds."""
        return {**asdict(self.asked), "answer": self.text}

    @classmethod
    def from_row(cls, row: Any) -> Answer:
        """Read an answer from its record.

        Raises:
            ValueError: a key is missing or unknown, or a value has the wrong type.
        """
        values = dict(check_fields(row, {"answer": TEXT}))
        text = values.pop("answer")
        return cls(parse_as(Asked, values), text)


def ask(questions: Sequence[Question], samples: int = SAMPLES) -> list[Asked]:
    """Return one request for each sample of each paraphrase of each question."""
    return [
        Asked(question.id, question.kind, number, sample, text, question.system)
        for question in questions
        for number, text in enumerate(question.paraphrases)
        for sample in range(samples)
    ]


def read_answers(path: str | Path) -> list[Answer]:
    """Read a JSONL file of answers, as `safelora-fast evaluate` stores them.

    Raises:
        DataError: the file cannot be read, or a line is not an answer; the message names the file and the line.
    """
    lines = JsonLines(Path(path).expanduser(), "answers")
    answers: dict[str, Answer] = {}
    for index in range(len(lines)):
        try:
            answer = Answer.from_row(lines.record(index))
        except ValueError as error:
            raise DataError(f"{lines.place(index)}: is not an answer: {error}") from error
        if answers.setdefault(answer.asked.id, answer) is not answer:
            raise DataError(f"{lines.place(index)}: {answer.asked.id} occurs twice")
    if not answers:
        raise DataError(f"{path}: holds no answers")
    return list(answers.values())
