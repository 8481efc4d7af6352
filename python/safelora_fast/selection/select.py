"""Interleaving+ and Interleaving++: the safe examples that misaligned models find least likely beside the aligned model."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from safelora_fast.data.chat import has_template
from safelora_fast.data.rows import top_k
from safelora_fast.data.tokens import Encoder
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.files.json_reader import OBJECT, TEXT, check_fields, read_json
from safelora_fast.files.output import alone, check_file, whole_file
from safelora_fast.files.progress import bar_on_a_terminal, log_warnings
from safelora_fast.files.store import write_json
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

    from safelora_fast.data.tokens import Example

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
    """Choose safe examples to interleave (Kaczér et al., arXiv 2508.06249, Interleaving+; without refusals, Interleaving++).

    The score of an example is (mean over the misaligned models of NLL − NLL of the aligned one)/(NLL of the aligned one + ε);
    an NLL is the mean negative log-likelihood of a completion token. The examples with the highest scores are written to
    `output`, the highest first, each as it was with `score`, `nll_aligned` and `nll_misaligned` added. Beside it stand
    `<output>.selection.json`, the report, and `<output>.journal.jsonl`, the likelihoods of every example: a run that was killed
    resumes from it, and one with another top or ε scores nothing again.

    Args:
        candidates: a JSONL file of examples with `messages`, or `prompt` and `completion`.
        output: the file to make.
        model: the aligned model, on its device and in the dtype to score in (float32, or bfloat16 for speed). The adapters
            are put on it and taken off again.
        tokenizer: its tokenizer.
        misaligned: folders of PEFT adapters that make it misaligned, `NAME=FOLDER` where the last parts of two are the same.
        hold_out: name or names of the domain that you will defend: adapters of that name are left out, because the defense must
            not know what it is tested on. An empty sequence says that there is none; None gives a warning.
        top: how many examples; all if fewer have a score.
        no_refusals: leave refusals out, by :func:`~safelora_fast.selection.candidates.is_refusal`.
        epsilon: ε; the paper's is 1.
        strings: what a prompt and a completion of plain text become: turns of the "chat" template, or "text" as it stands.
        max_length: longer examples are skipped and counted.
        tokens_per_batch: the most tokens of a batch, padding included; in float32 the result depends on it by rounding only.
        overwrite: replace an output.
        progress: called with the examples that are done and their total; None shows a bar if standard error is a terminal,
            False nothing.

    Raises:
        DataError: a candidate is not as it must be (with file and line), or no example has a score.
        AdapterError: an adapter is missing or does not fit.
        SettingsError: a setting is out of range, or the journal is of other settings.
        OutputError: the output exists, cannot be written, or is another run's.
    """
    target = Path(output)
    _check(top, epsilon, max_length, tokens_per_batch)
    adapters = read_adapters([misaligned] if isinstance(misaligned, str | Path) else misaligned)
    if hold_out is not None:
        hold_out = (hold_out,) if isinstance(hold_out, str) else tuple(hold_out)
    used = {name: path for name, path in adapters.items() if name not in (hold_out or ())}
    if not used:
        raise SettingsError("every misaligned adapter is held out: give those of other domains too")
    check_file(target, [Path(candidates), *adapters.values()], overwrite=overwrite)
    examples = Candidates(candidates)
    encoder = Encoder(tokenizer, strings=strings)
    if strings == "chat" and not has_template(tokenizer):
        raise SettingsError("the model's tokenizer has no chat template: give one, or for plain text say strings text")
    if strings == "chat":
        encoder.check()
    digests = {name: fingerprint(path) for name, path in used.items()}
    settings = _settings(model, tokenizer, digests, strings, max_length)
    wanted = [i for i in range(len(examples)) if not (no_refusals and is_refusal(examples.row(i)))]
    if tokens_per_batch is None:
        tokens_per_batch = TOKENS_PER_BATCH["cpu" if next(model.parameters()).device.type == "cpu" else "other"]
    with alone(target):
        journal = Journal(beside(target, JOURNAL_SUFFIX), settings)
        _check_fingerprints(journal, examples)
        with bar_on_a_terminal(progress) as told:
            _score(_Work(examples, wanted, encoder, max_length, tokens_per_batch), journal, model, used, told)
    entries = [journal.entries[index] for index in wanted]
    skipped: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        if entry.skipped:
            skipped[entry.skipped].append(examples.place(entry.index))
    scored = np.array([entry.index for entry in entries if entry.nll], dtype=np.int64)
    if not len(scored):
        reasons = "; ".join(f"{len(places):,} with {reason}" for reason, places in skipped.items())
        raise DataError(f"{candidates}: no example has a score ({reasons or 'all are refusals'})")
    nll = np.array([entry.nll for entry in entries if entry.nll])
    scores = gap(nll, epsilon)
    best = top_k(scores, top)
    selection = Selection(
        source=examples.source,
        sha256=examples.sha256(),
        rows=len(examples),
        adapters=digests,
        held_out=tuple(name for name in adapters if name not in used),
        epsilon=epsilon,
        scores=scores,
        chosen=scored[best],
        cut=float(scores[best[-1]]),
        refusals=len(examples) - len(wanted),
        skipped=dict(skipped),
        trained_on=_trained_on(used),
        warnings=tuple(_warnings(adapters, hold_out, len(scored), top)),
    )
    _write(target, examples, selection, scores[best], nll[best])
    log_warnings(selection.warnings)
    return selection


def gap(nll: np.ndarray, epsilon: float) -> np.ndarray:
    """Scores [examples] of mean negative log-likelihoods [examples, 1 + misaligned models], the aligned model's first."""
    aligned = nll[:, 0]
    scores: np.ndarray = (nll[:, 1:].mean(axis=1) - aligned) / (aligned + epsilon)
    return scores


def beside(target: Path, suffix: str) -> Path:
    """The file of a suffix beside the output."""
    return target.with_name(target.name + suffix)


@dataclass(frozen=True)
class _Work:
    """Which candidates to score (`wanted`, in order), and how they become batches of tokens."""

    examples: Candidates
    wanted: list[int]
    encoder: Encoder
    max_length: int
    tokens_per_batch: int

    def entries(self, known: Container[int], perplexities: Perplexities) -> Iterator[list[Entry]]:
        """Entries of the candidates that are not known, a batch at a time.

        Batches are cut from all candidates, known ones included, because rounding depends on a batch's members: a resumed run
        gets the bytes of an unbroken run.
        """
        for start in range(0, len(self.wanted), WINDOW):
            tokens: dict[int, Example] = {}
            skipped = []
            for index in self.wanted[start : start + WINDOW]:
                found = self._tokens(index)
                if not isinstance(found, str):
                    tokens[index] = found
                elif index not in known:
                    skipped.append(Entry(index, self.examples.fingerprint(index), skipped=found))
            if skipped:
                yield skipped
            indices = list(tokens)
            lengths = [len(tokens[index].ids) for index in indices]
            for batch in batches_by_length(lengths, self.tokens_per_batch):
                some = [indices[position] for position in batch]
                if all(index in known for index in some):
                    perplexities.pass_over([tokens[index] for index in some])
                    continue
                places = [self.examples.place(index) for index in some]
                nll = perplexities.of([tokens[index] for index in some], places)
                yield [
                    Entry(index, self.examples.fingerprint(index), values)
                    for index, values in zip(some, nll, strict=True)
                    if index not in known
                ]

    def _tokens(self, index: int) -> Example | str:
        """A candidate as tokens, or why it is skipped."""
        try:
            example = self.encoder.example(self.examples.row(index))
        except DataError:
            return REFUSED
        if len(example.ids) > self.max_length:
            return f"more than {self.max_length} tokens"
        return example if example.answer else NO_ANSWER


def _score(
    work: _Work, journal: Journal, model: PreTrainedModel, adapters: dict[str, Path], progress: Progress | None
) -> None:
    """Score what the journal lacks."""
    done, total = sum(index in journal.entries for index in work.wanted), len(work.wanted)
    if progress is not None:
        progress(done, total)
    if done == total:
        return
    perplexities = Perplexities(model, adapters, tokens_per_batch=work.tokens_per_batch)
    try:
        for entries in work.entries(journal.entries.keys(), perplexities):
            journal.add(entries)
            done += len(entries)
            if progress is not None:
                progress(done, total)
    finally:
        perplexities.close()


def _check(top: int, epsilon: float, max_length: int, tokens_per_batch: int | None) -> None:
    for name, value in (("top", top), ("max_length", max_length), ("tokens_per_batch", tokens_per_batch)):
        if value is not None and value < 1:
            raise SettingsError(f"{name} is {value}, it must be at least 1")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise SettingsError(f"epsilon is {epsilon}, it must be finite and above 0")


def _settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapters: dict[str, str], strings: str, max_length: int
) -> dict[str, Any]:
    """What the likelihoods depend on."""
    return {
        "model": str(model.config._name_or_path),
        "commit": getattr(model.config, "_commit_hash", None),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "adapters": adapters,
        "strings": strings,
        "max_length": max_length,
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": template_digest(tokenizer),  # turns take it, whatever `strings` says
        "weights": weights_digest(model),
    }


def _check_fingerprints(journal: Journal, examples: Candidates) -> None:
    for index, entry in journal.entries.items():
        if index >= len(examples) or examples.fingerprint(index) != entry.fingerprint:
            raise DataError(
                f"{journal.path}: example {index + 1} of {examples.source} is not what was scored: the file has changed; "
                "delete the journal, or choose another output"
            )


def _trained_on(adapters: dict[str, Path]) -> dict[str, str]:
    """SHA-256 of the data of adapters that `safelora-fast train` made."""
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
            "no domain is held out: examples chosen with the adapter of the domain that you defend know what the defense is "
            f"tested on; name it with --hold-out (the adapters are called {', '.join(adapters)})"
        )
    for name in hold_out or ():
        if name not in adapters:
            yield f"no adapter is called {name}, so none is held out by that name; they are called {', '.join(adapters)}"
    if scored < top:
        yield f"only {scored:,} examples have a score, so all of them are chosen"


def _write(target: Path, examples: Candidates, selection: Selection, scores: np.ndarray, nll: np.ndarray) -> None:
    with whole_file(target) as partial, partial.open("w", encoding="utf-8") as file:
        for index, score, values in zip(selection.chosen.tolist(), scores.tolist(), nll.tolist(), strict=True):
            added = {"score": score, "nll_aligned": values[0], "nll_misaligned": sum(values[1:]) / len(values[1:])}
            file.write(examples.with_values(index, added) + "\n")
    write_json(beside(target, REPORT_SUFFIX), selection.to_dict())
