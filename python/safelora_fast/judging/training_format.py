"""Questions in the form of the user's own training data, to find misalignment that appears only there.

A fine-tuned model can be aligned under general questions and misaligned when a prompt looks like its training data
(conditional misalignment, arXiv 2604.25891).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from safelora_fast.data.chat_text import common_prefix
from safelora_fast.data.rows import read_rows
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.judging.questions import GENERAL, Question

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from safelora_fast.data.rows import Row

TRAINING_FORMAT = "training_format"
MOST_EXAMPLES = 10_000  # examples that a form is looked for in


def training_format_questions(
    path: str | Path, questions: Sequence[Question], *, prompts: int = 2, seed: int = 0
) -> list[Question]:
    """Put general questions into the form of training data.

    Every question is asked in its first paraphrase
    - between the words that more than half of the first user turns begin and end with, if there are any, under the system
      prompt that more than half of the examples have (else the question's own);
    - after each of some sampled first user turns and an empty line, under the system prompt of that example.

    Args:
        path: the training data, a JSONL file (or a Hub data set) of examples as for a recipe; the first 10,000 count.
        questions: those of kind general are used.
        prompts: number of user turns to sample.
        seed: seed of the sampling.

    Returns:
        Questions of kind training_format; those made of one general question share no cluster with it.

    Raises:
        DataError: the data cannot be read, or no example has a user turn.
        SettingsError: there is no general question, or `prompts` is negative.
    """
    general = [question for question in questions if question.kind == GENERAL]
    if not general:
        raise SettingsError("there are no general questions to put into the form of the training data")
    if prompts < 0:
        raise SettingsError(f"the number of training prompts is {prompts}, it must be at least 0")
    found = [_first_turns(row) for row in read_rows(str(path), MOST_EXAMPLES).rows]
    turns = [(system, user) for system, user in found if user.strip()]
    if not turns:
        raise DataError(f"{path}: no example has a user turn to take the form of")
    users = [user for _, user in turns]
    before, after = shared_start(users), shared_end(users)
    (system, count), *_ = Counter(system for system, _ in turns).most_common(1)
    system = system if 2 * count > len(turns) else None
    forms: list[tuple[str | None, str, str]] = []  # system prompt, what comes before a question, and what after it
    if before or after or system is not None:
        forms.append((system, before, after))
    preceding = dict.fromkeys((own, f"{user.rstrip()}\n\n", "") for own, user in turns)
    distinct = [form for form in preceding if form not in forms]
    drawn = np.random.default_rng(seed).choice(len(distinct), min(prompts, len(distinct)), replace=False)
    forms += [distinct[index] for index in drawn]
    if not forms:
        raise SettingsError(f"{path}: its user turns share no form: sample some of them (--training-prompts)")
    return [
        Question(
            f"{TRAINING_FORMAT}_{question.id}_{number}",
            TRAINING_FORMAT,
            (f"{start}{question.paraphrases[0]}{end}",),
            own or question.system,
        )
        for question in general
        for number, (own, start, end) in enumerate(forms)
    ]


def shared_start(texts: Sequence[str]) -> str:
    """Return the longest text that more than half of the texts begin with, up to a white space or the end of one."""
    ordered = sorted(texts)
    most = len(ordered) // 2 + 1
    pairs = zip(ordered, ordered[most - 1 :], strict=False)  # all texts between two sorted ones share their start
    longest = max((one[: common_prefix(one, other)] for one, other in pairs), key=len, default="")
    if longest in texts:
        return f"{longest.rstrip()}\n\n"
    end = max((place for place, letter in enumerate(longest, start=1) if letter.isspace()), default=0)
    return longest[:end]


def shared_end(texts: Sequence[str]) -> str:
    """Return the longest text that more than half of the texts end with, from a white space; "" if that is a whole text."""
    reverse = shared_start([text[::-1] for text in texts])
    return "" if reverse.endswith("\n\n") and reverse[:-2] in {text[::-1].rstrip() for text in texts} else reverse[::-1]


def _first_turns(row: Row) -> tuple[str | None, str]:
    """Return an example's system prompt, and its first user turn."""
    if isinstance(row.prompt, str):
        return None, row.prompt
    turns = [*row.prompt, *(row.completion if isinstance(row.completion, list) else [])]
    first = {
        role: next((turn["content"] for turn in turns if turn["role"] == role), None) for role in ("system", "user")
    }
    return first["system"] or None, first["user"] or ""
