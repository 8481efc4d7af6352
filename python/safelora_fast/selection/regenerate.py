"""On-policy safe examples: the completions of a pool, written anew by the model that will be trained."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.model_card import shown_model
from safelora_fast.data.chat import chat_of, has_template
from safelora_fast.data.rows import Row
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.files.json_reader import COUNT, TEXT, check_fields
from safelora_fast.files.output import alone, check_file, whole_file
from safelora_fast.files.progress import bar_on_a_terminal
from safelora_fast.files.store import write_json
from safelora_fast.models.digests import template_digest, tokenizer_digest, weights_digest
from safelora_fast.selection.candidates import Candidates, is_refusal
from safelora_fast.selection.journal import Entry, Journal
from safelora_fast.selection.scan import REFUSED, WINDOW, check_fingerprints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from safelora_fast.data.rows import Message

COLUMN = "regenerated"
OF_FORMER = ("score", "nll_aligned", "nll_misaligned")  # columns of `select` that belong to the former completion
JOURNAL_SUFFIX, REPORT_SUFFIX = ".journal.jsonl", ".regeneration.json"
SEVERAL = "more than one completion, or none at the end"


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled, and which of them are kept: the arguments of :func:`regenerate_completions`."""

    temperature: float
    top_p: float
    seed: int
    max_tokens: int
    min_tokens: int
    max_prompt: int


@dataclass(frozen=True)
class Regeneration:
    """The outcome of :func:`regenerate_completions`.

    Attributes:
        source: the pool's file.
        sha256: digest of the pool.
        rows: number of examples in the pool.
        written: number of examples in the output.
        refusals: completions left out because they refuse.
        unfinished: completions left out because they did not end.
        short: completions left out because they are too short.
        skipped: places of examples without a new completion, by reason.
        made_by: the model and how its completions were sampled.
    """

    source: str
    sha256: str
    rows: int
    written: int
    refusals: int
    unfinished: int
    short: int
    skipped: dict[str, list[str]]
    made_by: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values; skipped examples as their number and the first place."""
        skipped = {reason: {"rows": len(places), "first": places[0]} for reason, places in self.skipped.items()}
        return {**asdict(self), "skipped": skipped}


@dataclass(frozen=True)
class Written(Entry):
    """The new completion of one example, as text and in tokens."""

    text: str = ""
    tokens: int = 0


class Completions(Journal):
    """The journal of new completions."""

    def _entry(self, line: Any) -> Entry:
        values = check_fields(line, {"row": COUNT, "of": TEXT}, {"text": TEXT, "tokens": COUNT, "skipped": TEXT})
        text, tokens = values.get("text", ""), values.get("tokens", 0)
        if ("skipped" in values) == ("text" in values):
            raise ValueError("a line has either text or skipped")
        return Written(values["row"], values["of"], skipped=values.get("skipped"), text=text, tokens=tokens)

    def _values(self, entry: Entry) -> dict[str, Any]:
        assert isinstance(entry, Written)  # noqa: S101
        return {"text": entry.text, "tokens": entry.tokens}


def regenerate_completions(
    pool: str | Path,
    output: str | Path,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    max_tokens: int = 512,
    min_tokens: int = 1,
    max_prompt: int = 2048,
    keep_refusals: bool = False,
    batch_size: int = 16,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | bool | None = None,
) -> Regeneration:
    """Replace each completion of a pool by one that the model writes to the same prompt (arXiv 2605.31328).

    Examples keep their order and their other columns, except for the scores of `select`, which belong to the former
    completion. `regenerated` is added: model, digest of its weights, sampling, line and digest of the former example, and
    the completion's number of tokens. An example with several completions, such as a longer conversation, is skipped.

    `<output>.journal.jsonl` keeps every completion, so an interrupted run resumes. `<output>.regeneration.json` is the
    report. Random numbers belong to the seed and the example, so batches and interruptions do not change a completion (up to
    rounding of the logits).

    Args:
        pool: a JSONL file of examples with `messages`, or `prompt` and `completion`.
        output: the output file.
        model: the model before training, with an adapter or without.
        tokenizer: its tokenizer, whose chat template is used.
        temperature: 0 takes the most likely tokens; the paper uses 0.7.
        top_p: only the most likely tokens whose probabilities sum to it are sampled; the paper uses 0.9.
        seed: seed of all completions.
        max_tokens: a completion that has not ended after so many tokens is left out.
        min_tokens: a completion of fewer tokens is left out.
        max_prompt: examples with a longer prompt, in tokens, are skipped and counted.
        keep_refusals: keep completions that refuse (:func:`~safelora_fast.selection.candidates.is_refusal`).
        batch_size: completions per batch.
        overwrite: replace an existing output.
        progress: called with the number of finished examples and the total. None shows a progress bar if standard error
            is a terminal; False shows nothing.

    Raises:
        DataError: an example is invalid (the message names file and line), there is no chat template, or no completion is left.
        SettingsError: a setting is out of range, or the journal was written with other settings.
        OutputError: the output exists, cannot be written, or is in use by another run.
    """
    target, sampling = Path(output), Sampling(temperature, top_p, seed, max_tokens, min_tokens, max_prompt)
    _check(sampling, batch_size)
    check_file(target, [Path(pool)], overwrite=overwrite)
    examples = Candidates(pool)
    if not has_template(tokenizer):
        raise DataError("the tokenizer has no chat template: give one with --chat-template")
    made_by = {
        "model": shown_model(str(model.config._name_or_path)),
        "commit": getattr(model.config, "_commit_hash", None),
        "weights": weights_digest(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        **{name: value for name, value in asdict(sampling).items() if name != "min_tokens"},
    }
    settings = {**made_by, "tokenizer": tokenizer_digest(tokenizer), "chat_template": template_digest(tokenizer)}
    with alone(target):
        journal = Completions(target.with_name(target.name + JOURNAL_SUFFIX), {**settings, "batch_size": batch_size})
        check_fingerprints(journal, examples)
        with bar_on_a_terminal(progress) as told:
            done = sum(index in journal.entries for index in range(len(examples)))
            if told is not None:
                told(done, len(examples))
            for entries in _entries(examples, journal, model, tokenizer, sampling, batch_size):
                journal.add(entries)
                done += len(entries)
                if told is not None:
                    told(done, len(examples))
    return _write(target, examples, journal, sampling, made_by, keep_refusals=keep_refusals)


def _check(sampling: Sampling, batch_size: int) -> None:
    for name, value, least in (
        ("max_tokens", sampling.max_tokens, 1),
        ("min_tokens", sampling.min_tokens, 0),
        ("max_prompt", sampling.max_prompt, 1),
        ("seed", sampling.seed, 0),
        ("batch_size", batch_size, 1),
        ("temperature", sampling.temperature, 0),
    ):
        if not value >= least:
            raise SettingsError(f"{name} is {value}, it must be at least {least}")
    if sampling.min_tokens >= sampling.max_tokens:
        raise SettingsError(
            f"min_tokens is {sampling.min_tokens}, it must be below max_tokens ({sampling.max_tokens}): no completion would be kept"
        )
    if not 0 < sampling.top_p <= 1:
        raise SettingsError(f"top_p is {sampling.top_p}, it must be above 0 and at most 1")


def prompt_of(row: Row) -> list[Message] | None:
    """Return the turns before an example's completion; None unless it has one completion, at its end."""
    if isinstance(row.prompt, str):
        return [{"role": "user", "content": row.prompt}]
    turns = [*row.completion] if isinstance(row.completion, list) else []
    if [turn["role"] for turn in turns].count("assistant") != 1 or turns[-1]["role"] != "assistant":
        return None
    return [*row.prompt, *turns[:-1]]


def _entries(
    examples: Candidates,
    journal: Completions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    batch_size: int,
) -> Iterator[list[Entry]]:
    """Yield new completions, one batch at a time. Batches are cut from all examples, so a resumed run has the same ones."""
    from safelora_fast.models.generate import generate_completions

    chat, known = chat_of(tokenizer), journal.entries
    for start in range(0, len(examples), WINDOW):
        indices, prompts, skipped = [], [], []
        for index in range(start, min(start + WINDOW, len(examples))):
            prompt = prompt_of(examples.row(index))
            reason = SEVERAL if prompt is None else _unsuitable(chat, prompt, sampling)
            if reason is None and prompt is not None:
                indices.append(index)
                prompts.append(prompt)
            elif index not in known:
                skipped.append(Entry(index, examples.fingerprint(index), skipped=reason))
        if skipped:
            yield skipped
        for batch in generate_completions(
            model,
            tokenizer,
            prompts,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seeds=[(sampling.seed << 40) + index for index in indices],
            batch_size=batch_size,
            known={place for place, index in enumerate(indices) if index in known},
        ):
            made = [(indices[place], completion) for place, completion in batch.items() if indices[place] not in known]
            yield [
                Written(index, examples.fingerprint(index), text=completion.text, tokens=completion.tokens)
                for index, completion in made
            ]


def _unsuitable(chat: Any, prompt: list[Message], sampling: Sampling) -> str | None:
    try:
        tokens = chat.prompt(prompt)
    except DataError:
        return REFUSED
    return f"a prompt of more than {sampling.max_prompt} tokens" if len(tokens) > sampling.max_prompt else None


def _write(
    target: Path,
    examples: Candidates,
    journal: Completions,
    sampling: Sampling,
    made_by: dict[str, Any],
    *,
    keep_refusals: bool,
) -> Regeneration:
    counts, skipped = {"written": 0, "refusals": 0, "unfinished": 0, "short": 0}, defaultdict(list)
    with whole_file(target) as partial:
        with partial.open("w", encoding="utf-8") as file:
            for index in range(len(examples)):
                entry = journal.entries[index]
                if entry.skipped is not None or not isinstance(entry, Written):
                    skipped[str(entry.skipped)].append(examples.place(index))
                    continue
                kind = _kind(entry, sampling, keep_refusals=keep_refusals)
                counts[kind] += 1
                if kind == "written":
                    origin = {"row": index + 1, "of": entry.fingerprint, "tokens": entry.tokens}
                    file.write(_line(examples.record(index), entry.text, {**made_by, **origin}) + "\n")
        if not counts["written"]:
            found = [f"{number:,} {kind}" for kind, number in counts.items() if number]
            found += [f"{len(places):,} with {reason}" for reason, places in skipped.items()]
            raise DataError(f"{examples.source}: no completion is left ({'; '.join(found)})")
    report = Regeneration(
        examples.source, examples.sha256(), len(examples), **counts, skipped=dict(skipped), made_by=made_by
    )
    write_json(target.with_name(target.name + REPORT_SUFFIX), report.to_dict())
    return report


def _kind(entry: Written, sampling: Sampling, *, keep_refusals: bool) -> str:
    """Return "written", or why a completion is left out, as a count of the report."""
    if entry.tokens >= sampling.max_tokens:
        return "unfinished"
    if entry.tokens < sampling.min_tokens or not entry.text.strip():
        return "short"
    return "refusals" if not keep_refusals and is_refusal(Row("", "", entry.text)) else "written"


def _line(record: dict[str, Any], text: str, made_by: dict[str, Any]) -> str:
    """Return an example's line with another completion."""
    column = "messages" if record.get("messages") is not None else "completion"
    former: Any = record[column]
    completion = text if isinstance(former, str) else [*former[:-1], {"role": "assistant", "content": text}]
    kept = {name: value for name, value in record.items() if name not in OF_FORMER}
    line = json.dumps({**kept, column: completion, COLUMN: made_by}, ensure_ascii=False)
    return line.encode(errors="backslashreplace").decode()  # a lone surrogate can only be written as an escape
