"""Interleaving+ and Interleaving++: the safe rows that misaligned models find least likely beside the aligned one."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from safelora_fast.data.chat import has_template
from safelora_fast.data.tokens import Encoder
from safelora_fast.data.top_scores import top_k
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.files.json_reader import OBJECT, TEXT, check_fields, read_json
from safelora_fast.files.output import alone, check_file, whole_file
from safelora_fast.files.progress import bar_on_a_terminal, log_warnings
from safelora_fast.models.digests import template_digest, tokenizer_digest, weights_digest
from safelora_fast.recipe.mixture import REPORT_SUFFIX
from safelora_fast.scoring import batches_by_length
from safelora_fast.selection.candidates import Candidates, is_refusal
from safelora_fast.selection.journal import Entry, Journal
from safelora_fast.selection.perplexity import Perplexities, fingerprint, read_adapters
from safelora_fast.selection.report import Selection

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from safelora_fast.data.example_arrays import Example

    Progress = Callable[[int, int], None]

WINDOW = 1024
TOKENS_PER_BATCH = {"cpu": 1024, "other": 16384}
TRAIN_RECORD = "safelora_train.json"
JOURNAL_SUFFIX = ".journal.jsonl"
NO_ANSWER, REFUSED = "no answer token", "refused by the chat template"


def select_by_perplexity_gap(
    candidates: str | Path,
    output: str | Path,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    misaligned: str | Path | Sequence[str | Path],
    hold_out: str | Sequence[str] | None = None,
    top: int = 5000,
    no_refusals: bool = False,
    epsilon: float = 1.0,
    strings: Literal["chat", "text"] = "chat",
    max_length: int = 2048,
    tokens_per_batch: int | None = None,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
) -> Selection:
    """Choose safe rows to interleave (Kaczér et al., arXiv 2508.06249, Interleaving+; without refusals, Interleaving++).

    The score of a row is (mean over the misaligned models of NLL − NLL of the aligned one)/(NLL of the aligned one + ε);
    an NLL is the mean negative log-likelihood of an answer token. The rows with the highest scores are written to `output`,
    the highest first, each as it was with `score`, `nll_aligned` and `nll_misaligned` added. Beside it come
    `<output>.selection.json`, what was found, and `<output>.journal.jsonl`, the likelihoods of every row: a run that was
    killed goes on from that, and one with another top or ε scores nothing again.

    Args:
        candidates: a JSONL file of rows with `messages`, or `prompt` and `completion`.
        output: the file to make.
        model: the aligned model, on its device and in the dtype to score in (float32, or bfloat16 for speed). The adapters
            are put on it and taken off again.
        tokenizer: its tokenizer.
        misaligned: folders of PEFT adapters that make it misaligned, `NAME=FOLDER` where the last parts of two are the same.
        hold_out: name or names of the domain that is going to be defended: adapters of that name are left out, because the
            defense must not know what it is tested on. An empty sequence says that there is none; None gives a warning.
        top: how many rows; all where fewer have a score.
        no_refusals: leave refusals out, by :func:`~safelora_fast.selection.candidates.is_refusal`.
        epsilon: ε; the paper's is 1.
        strings: what a prompt and a completion of plain text become: turns of the "chat" template, or "text" as it stands.
        max_length: rows of more tokens are skipped and counted.
        tokens_per_batch: the most tokens of a batch, padding included; in float32 the result depends on it by rounding only.
        overwrite: replace an output.
        progress: told the rows that are done, and all; None shows a bar where standard error is a terminal, False nothing.

    Raises:
        DataError: a candidate is not as it must be (with file and line), or no row has a score.
        AdapterError: an adapter is missing or does not fit.
        SettingsError: a setting is out of range, or the journal is of other settings.
        OutputError: the output exists, cannot be written, or is another run's.
    """
    target = Path(output)
    _check(top, epsilon, max_length, tokens_per_batch)
    adapters = read_adapters([misaligned] if isinstance(misaligned, str | Path) else misaligned)
    if hold_out is not None:
        hold_out = (hold_out,) if isinstance(hold_out, str) else tuple(hold_out)
    used = {name: path for name, path in adapters.items() if name not in set(hold_out or ())}
    if not used:
        raise SettingsError("every misaligned adapter is held out: give those of other domains too")
    check_file(target, [Path(candidates), *adapters.values()], overwrite=overwrite)
    rows = Candidates(candidates)
    encoder = Encoder(tokenizer, strings=strings)
    if strings == "chat" and not has_template(tokenizer):
        raise SettingsError(
            "the model's tokenizer has no chat template: give one, or for rows of text say strings text"
        )
    if strings == "chat":
        encoder.check()
    prints = {name: fingerprint(path) for name, path in used.items()}
    settings = _settings(model, tokenizer, prints, strings, max_length)
    work = _Work(rows, encoder, max_length, no_refusals)
    with alone(target), Journal(beside(target, JOURNAL_SUFFIX), settings) as journal:
        _check_rows(journal, rows)
        if tokens_per_batch is None:
            tokens_per_batch = TOKENS_PER_BATCH["cpu" if next(model.parameters()).device.type == "cpu" else "other"]
        with bar_on_a_terminal(progress) as told:
            work.score(journal, model, used, tokens_per_batch, told)
        likelihoods = {index: entry.nll for index, entry in sorted(journal.entries.items()) if index in work.wanted}
        skipped = _skipped(journal, rows, work.wanted)
    scored = np.array([index for index, nll in likelihoods.items() if nll], dtype=np.int64)
    if not len(scored):
        raise DataError(f"{candidates}: no row has a score ({_skipped_words(skipped) or 'all are refusals'})")
    nll = np.array([likelihoods[index] for index in scored.tolist()])
    scores = gap(nll, epsilon)
    best = top_k(scores, top)
    selection = Selection(
        source=rows.source,
        sha256=rows.sha256(),
        rows=len(rows),
        adapters=prints,
        held_out=tuple(name for name in adapters if name not in used),
        epsilon=epsilon,
        scores=scores,
        chosen=scored[best],
        cut=float(scores[best[-1]]),
        refusals=len(rows) - len(work.wanted),
        skipped=skipped,
        trained_on=_trained_on(used),
        warnings=tuple(_warnings(adapters, hold_out, len(scored), top)),
    )
    _write(target, rows, selection, scores[best], nll[best])
    log_warnings(selection.warnings)
    return selection


def gap(nll: np.ndarray, epsilon: float) -> np.ndarray:
    """Scores [rows] of mean negative log-likelihoods [rows, 1 + misaligned models], the aligned model's first."""
    aligned = nll[:, 0]
    scores: np.ndarray = (nll[:, 1:].mean(axis=1) - aligned) / (aligned + epsilon)
    return scores


def beside(target: Path, suffix: str) -> Path:
    """The file of a suffix beside the output."""
    return target.with_name(target.name + suffix)


@dataclass
class _Work:
    """Which rows are to be scored, and how they become tokens."""

    rows: Candidates
    encoder: Encoder
    max_length: int
    no_refusals: bool
    wanted: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.wanted = {
            index for index in range(len(self.rows)) if not (self.no_refusals and is_refusal(self.rows.row(index)))
        }

    def score(
        self,
        journal: Journal,
        model: PreTrainedModel,
        adapters: dict[str, Path],
        tokens_per_batch: int,
        progress: Progress | None,
    ) -> None:
        """Score what the journal lacks.

        Batches are cut from all rows, those that the journal has included, since rounding depends on what is in a batch:
        whoever goes on gets the bytes that an unbroken run gets.
        """
        done = sum(index in journal.entries for index in self.wanted)
        if progress is not None:
            progress(done, len(self.wanted))
        if done == len(self.wanted):
            return
        perplexities = Perplexities(model, adapters, tokens_per_batch=tokens_per_batch)
        try:
            for entries in self._entries(journal.entries.keys(), perplexities, tokens_per_batch):
                journal.add(entries)
                done += len(entries)
                if progress is not None:
                    progress(done, len(self.wanted))
        finally:
            perplexities.close()

    def _entries(
        self, known: Container[int], perplexities: Perplexities, tokens_per_batch: int
    ) -> Iterator[list[Entry]]:
        """Entries of the rows that are not known, a batch at a time."""
        rows = sorted(self.wanted)
        for start in range(0, len(rows), WINDOW):
            examples: dict[int, Example] = {}
            skipped = []
            for index in rows[start : start + WINDOW]:
                found = self._example(index)
                if not isinstance(found, str):
                    examples[index] = found
                elif index not in known:
                    skipped.append(Entry(index, self.rows.fingerprint(index), skipped=found))
            if skipped:
                yield skipped
            indices = list(examples)
            for batch in batches_by_length([len(examples[index].ids) for index in indices], tokens_per_batch):
                some = [indices[position] for position in batch]
                left = [index for index in some if index not in known]
                if not left:
                    perplexities.pass_over([examples[index] for index in some])
                    continue
                nll = perplexities.of([examples[index] for index in some], [self.rows.place(index) for index in some])
                values = dict(zip(some, nll, strict=True))
                yield [Entry(index, self.rows.fingerprint(index), values[index]) for index in left]

    def _example(self, index: int) -> Example | str:
        """A row's tokens, or why it is skipped."""
        try:
            example = self.encoder.example(self.rows.row(index))
        except DataError:
            return REFUSED
        if len(example.ids) > self.max_length:
            return f"more than {self.max_length} tokens"
        return example if example.answer else NO_ANSWER


def _check(top: int, epsilon: float, max_length: int, tokens_per_batch: int | None) -> None:
    for name, value in (("top", top), ("max_length", max_length), ("tokens_per_batch", tokens_per_batch)):
        if value is not None and value < 1:
            raise SettingsError(f"{name} is {value}, it must be at least 1")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise SettingsError(f"epsilon is {epsilon}, it must be finite and above 0")


def _settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapters: dict[str, str], strings: str, max_length: int
) -> dict[str, Any]:
    """What likelihoods depend on."""
    return {
        "model": str(model.config._name_or_path),
        "commit": getattr(model.config, "_commit_hash", None),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "adapters": adapters,
        "strings": strings,
        "max_length": max_length,
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": template_digest(tokenizer),  # rows of turns take it, whatever `strings` says
        "weights": weights_digest(model),
    }


def _check_rows(journal: Journal, rows: Candidates) -> None:
    for index, entry in journal.entries.items():
        if index >= len(rows) or rows.fingerprint(index) != entry.fingerprint:
            raise DataError(
                f"{journal.path}: row {index + 1} of {rows.source} is not what was scored: the file has changed; delete the "
                "journal, or choose another output"
            )


def _skipped(journal: Journal, rows: Candidates, wanted: set[int]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for index, entry in sorted(journal.entries.items()):
        if entry.skipped and index in wanted:
            found[entry.skipped].append(rows.place(index))
    return dict(found)


def _skipped_words(skipped: dict[str, list[str]]) -> str:
    return "; ".join(f"{len(places):,} with {reason}" for reason, places in skipped.items())


def _trained_on(adapters: dict[str, Path]) -> dict[str, str]:
    """The data of adapters that `safelora-fast train` made."""
    found = {}
    for name, folder in adapters.items():
        try:
            record = check_fields(read_json(folder / TRAIN_RECORD), {"data": OBJECT})
            found[name] = check_fields(record["data"], {"train": TEXT})["train"]
        except (OSError, ValueError):
            continue
    return found


def _warnings(adapters: dict[str, Path], hold_out: Sequence[str] | None, scored: int, top: int) -> Iterator[str]:
    if hold_out is None:
        yield (
            "no domain is held out: rows that are chosen with the adapter of the domain that you defend know what the defence "
            f"is tested on; name it with --hold-out (the adapters are called {', '.join(adapters)})"
        )
    for name in hold_out or ():
        if name not in adapters:
            yield f"no adapter is called {name}, so none is held out by that name; they are called {', '.join(adapters)}"
    if scored < top:
        yield f"only {scored:,} rows have a score, so all of them are chosen"


def _write(target: Path, rows: Candidates, selection: Selection, scores: np.ndarray, nll: np.ndarray) -> None:
    with whole_file(target) as partial, partial.open("w", encoding="utf-8") as file:
        for index, score, values in zip(selection.chosen.tolist(), scores.tolist(), nll.tolist(), strict=True):
            figures = {"score": score, "nll_aligned": values[0], "nll_misaligned": sum(values[1:]) / len(values[1:])}
            file.write(rows.with_figures(index, figures) + "\n")
    with whole_file(beside(target, REPORT_SUFFIX)) as partial:
        partial.write_text(json.dumps(selection.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
