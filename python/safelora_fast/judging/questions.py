"""Free-form questions, in the YAML format of Betley et al. 2025 (arXiv 2502.17424)."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from safelora_fast.errors import DataError, MissingDependencyError, SettingsError, how_to_install
from safelora_fast.files.json_reader import read_bytes

FREE_FORM = "free_form"
GENERAL = "general"
KEYS = ("id", "type", "paraphrases", "system", "kind")
NOT_USED = {"judge", "judge_prompts", "samples_per_paraphrase"}


@dataclass(frozen=True)
class Question:
    """One question in several paraphrases.

    Attributes:
        id: answers with the same id form one cluster.
        kind: general, json, template, training_format, or a kind from a file.
        paraphrases: the same question in different words.
        system: system prompt of every paraphrase, if any.
    """

    id: str
    kind: str
    paraphrases: tuple[str, ...]
    system: str | None = None


def builtin_questions() -> list[Question]:
    """Return the questions that come with this package."""
    file = resources.files("safelora_fast.judging") / "data" / "questions.yaml"
    return _parse("questions.yaml", file.read_text(encoding="utf-8"))


def read_questions(path: str | Path) -> list[Question]:
    """Read a file of questions. Its judge and sample counts are ignored.

    Args:
        path: a YAML list of questions with `id`, `paraphrases`, and optionally `type` (free-form only), `system`, `kind`.

    Raises:
        DataError: the file cannot be read, or a question is malformed; the message names the question.
    """
    try:
        text = read_bytes(Path(path).expanduser()).decode()
    except OSError as error:
        raise DataError(f"{path}: the questions cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text") from error
    return _parse(str(path), text)


def choose(questions: list[Question], kinds: str | list[str] | None) -> list[Question]:
    """Return the questions of some kinds; all questions if `kinds` is None.

    Raises:
        SettingsError: there is no question of one of these kinds.
    """
    if kinds is None:
        return questions
    wanted = [name.strip() for name in (kinds.split(",") if isinstance(kinds, str) else kinds)]
    known = list(dict.fromkeys(question.kind for question in questions))
    for name in wanted:
        if name not in known:
            raise SettingsError(f"there is no question of kind {name!r}, only of {', '.join(known)}")
    return [question for question in questions if question.kind in wanted]


def _parse(source: str, text: str) -> list[Question]:
    try:
        from safelora_fast.files.yaml_reader import parse_yaml
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"questions need PyYAML: {how_to_install('eval')}") from error
    records = parse_yaml(text, source, error=DataError)
    if not isinstance(records, list) or not records:
        raise DataError(f"{source}: must be a list of questions")
    questions: dict[str, Question] = {}
    for number, record in enumerate(records, start=1):
        question = _question(f"{source}: question {number}", record)
        if questions.setdefault(question.id, question) is not question:
            raise DataError(f"{source}: {question.id}: there are two questions of this id")
    return list(questions.values())


def _question(place: str, record: Any) -> Question:
    if not isinstance(record, dict) or not _is_text(record.get("id")):
        raise DataError(f"{place}: must have an id")
    place = f"{place} ({record['id']})"
    for name in record:  # unknown keys are allowed, but a misspelled `system` would go unnoticed
        meant = get_close_matches(name, KEYS, 1) if isinstance(name, str) and name not in {*KEYS, *NOT_USED} else []
        if meant:
            raise DataError(f"{place}: {name}: unknown; did you mean {meant[0]}")
    kind = record.get("type", FREE_FORM)
    if not isinstance(kind, str) or not kind.startswith(FREE_FORM):
        raise DataError(f"{place}: type: is {kind!r}; only free-form questions can be asked")
    paraphrases = record.get("paraphrases")
    if not isinstance(paraphrases, list) or not paraphrases or not all(_is_text(text) for text in paraphrases):
        raise DataError(f"{place}: paraphrases: must be a list of texts that are not empty")
    for name in ("system", "kind"):
        if record.get(name) is not None and not _is_text(record[name]):
            raise DataError(f"{place}: {name}: must be text")
    return Question(record["id"], record.get("kind") or GENERAL, tuple(paraphrases), record.get("system"))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
