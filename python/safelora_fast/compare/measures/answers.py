"""Answers to free-form questions, kept to be read by people: shares of misaligned and incoherent ones without a judge."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safelora_fast.compare.measures.base import Measure, Metric
from safelora_fast.compare.report import NOT_READ, Column
from safelora_fast.compare.statistics import shares
from safelora_fast.configuration.yaml_section import Section
from safelora_fast.data.chat import chat_of
from safelora_fast.errors import DataError
from safelora_fast.files.digest import text_digest
from safelora_fast.files.jsonl import JsonLines
from safelora_fast.files.store import JsonlStore
from safelora_fast.judging.answers import Answer, ask
from safelora_fast.judging.questions import builtin_questions, choose, read_questions
from safelora_fast.recipe.sections import Count

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.compare.comparison import CompareConfig
    from safelora_fast.compare.runs import Run
    from safelora_fast.compare.statistics import Sample
    from safelora_fast.compare.workbench import Workbench
    from safelora_fast.judging.answers import Asked

UNREAD = "unread.jsonl"
SEED = 0


class AnswersSection(Section):
    """The `answers:` section.

    Attributes:
        questions: a YAML file that replaces the packaged questions.
        kinds: question kinds, as a list or comma-separated; all by default.
        samples: number of answers to each paraphrase of a question.
        max_tokens: maximum number of tokens in an answer.
        temperature: 0 takes the most likely token; small models write nonsense at 1.
        read: JSONL file of labels, see :class:`Label`; without it there are answers, but no columns.
    """

    questions: str | None = None
    kinds: str | list[str] | None = "general"
    samples: Count = 2
    max_tokens: Count = 64
    temperature: Annotated[float, Field(ge=0)] = 1.0
    read: str | None = None


class Label(BaseModel):
    """A line of the file of labels: the same prompt and answer have the same label, whichever run gave it.

    Attributes:
        prompt: the question, as in `unread.jsonl`.
        answer: the answer, as in `unread.jsonl`.
        label: the reader's word.
    """

    model_config = ConfigDict(extra="forbid")
    prompt: str
    answer: str
    label: Literal["aligned", "misaligned", "incoherent"]


class Answers(Measure):
    """Sampled answers. Answers without a label are written to `unread.jsonl`, in an order that does not tell their runs."""

    name = title = "answers"
    order = 25
    settings = {"answers": (AnswersSection | None, None)}  # noqa: RUF012
    batched = True

    def check_inputs(self, config: CompareConfig) -> None:
        """Check that the questions and the labels can be read."""
        if config.measure.answers is not None:
            _asked(config)
            _labels(config)

    def applies(self, run: Run, config: CompareConfig) -> bool:
        """Return whether answers are asked for; the same for every run."""
        del run
        return config.measure.answers is not None

    def inputs(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Add the questions and the number of tokens to the base inputs; labels do not change the answers."""
        asked = [asdict(one) for one in _asked(bench.config)]
        section: AnswersSection = bench.config.measure.answers
        sampling = {"max_tokens": section.max_tokens, "temperature": section.temperature}
        return {**super().inputs(run, bench), "asked": text_digest(asked), **sampling}

    def work(self, run: Run, bench: Workbench) -> tuple[float, float]:
        """Return the tokens of prompts and answers. New tokens count twice: their products are small."""
        del run
        asked, chat = _asked(bench.config), chat_of(bench.tokenizer)
        new = 2.0 * len(asked) * bench.config.measure.answers.max_tokens
        return sum(len(chat.prompt(one.turns)) for one in asked) + new, new

    def take(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Return the answers, in the order of the questions."""
        from safelora_fast.models.generate import generate

        section: AnswersSection = bench.config.measure.answers
        asked, subject = _asked(bench.config), bench.subject(run.adapter)
        progress = bench.counting(f"answers of {run.label}", len(asked))
        texts: dict[int, str] = {}
        for batch in generate(
            subject.model, subject.tokenizer, [one.turns for one in asked],
            max_tokens=section.max_tokens, temperature=section.temperature,
            batch_size=bench.config.measure.batch_size, seeds=[SEED + number for number in range(len(asked))],
        ):  # fmt: skip
            texts.update(batch)
            progress(len(texts))
        return {"answers": [Answer(one, texts[number]).to_row() for number, one in enumerate(asked)]}

    def metrics(self, config: CompareConfig, contents: Sequence[Mapping[str, Any]]) -> Sequence[Metric]:
        """Return the shares of misaligned and incoherent answers among those that have a label."""
        del contents
        if config.measure.answers is None or config.measure.answers.read is None:
            return []
        labels = _labels(config)
        misaligned = Column(
            "misaligned_read", "aligned", "misaligned (read)", "%", "lower",
            "Free-form answers that a reader called misaligned, of those read.",
        )  # fmt: skip
        incoherent = Column(
            "incoherent_read", "coherent", "incoherent (read)", "%", "lower", "Those that a reader called incoherent."
        )
        return [_share(misaligned, "misaligned", labels), _share(incoherent, "incoherent", labels)]

    def publish(self, config: CompareConfig, contents: Sequence[Mapping[str, Any]]) -> None:
        """Write the answers without a label, sorted by digest, so that a reader cannot tell which run gave them."""
        labels = _labels(config)
        keys = dict.fromkeys(_key(row) for content in contents for row in content.get("answers", ()))
        unread = sorted((key for key in keys if key not in labels), key=text_digest)
        store = JsonlStore(config.output / UNREAD, "answer")
        store.remove()
        if unread:
            store.append({"prompt": prompt, "answer": answer, "label": None} for prompt, answer in unread)


def _asked(config: CompareConfig) -> list[Asked]:
    section: AnswersSection = config.measure.answers
    questions = builtin_questions() if section.questions is None else read_questions(section.questions)
    return ask(choose(questions, section.kinds), section.samples)


def _labels(config: CompareConfig) -> dict[tuple[str, str], str]:
    """Return the label of each read prompt and answer.

    Raises:
        DataError: the file cannot be read, or a line is not a label; the message names the line.
    """
    file = None if config.measure.answers is None else config.measure.answers.read
    if file is None or not Path(file).expanduser().exists():
        return {}
    found: dict[tuple[str, str], str] = {}
    lines = JsonLines(Path(file).expanduser(), "labels")
    for number in range(len(lines)):
        try:
            one = Label.model_validate(lines.record(number))
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(f"{lines.place(number)}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        if found.setdefault((one.prompt, one.answer), one.label) != one.label:
            raise DataError(f"{lines.place(number)}: the same answer has another label before")
    return found


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["prompt"], row["answer"]


def _share(column: Column, label: str, labels: Mapping[tuple[str, str], str]) -> Metric:
    def read(content: Mapping[str, Any], _reference: Mapping[str, Any]) -> Sample | str:
        rows = [row for row in content["answers"] if _key(row) in labels]
        return (
            shares([labels[_key(row)] == label for row in rows], [row["question"] for row in rows])
            if rows
            else NOT_READ
        )

    def count(contents: Sequence[Mapping[str, Any]]) -> str:
        rows = [labels.get(_key(row)) for content in contents for row in content["answers"]]
        read = [one for one in rows if one is not None]
        return f"{read.count(label)} of {len(read)} read, {len(rows) - len(read)} unread"

    return Metric(column, read, of_reference=True, count=count)
