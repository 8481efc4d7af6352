"""Selecting safe examples for Interleaving+ and ++: those least likely under misaligned models, relatively."""

from __future__ import annotations

import math
from collections import defaultdict
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
from safelora_fast.selection.candidates import Candidates, is_refusal
from safelora_fast.selection.journal import Journal
from safelora_fast.selection.perplexity import Perplexities, fingerprint, read_adapters
from safelora_fast.selection.report import Selection
from safelora_fast.selection.scan import Scan, default_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Progress = Callable[[int, int], None]

TRAIN_RECORD = "safelora_train.json"
JOURNAL_SUFFIX = ".journal.jsonl"


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

    The score of an example is (mean over the misaligned models of NLL − NLL of the aligned one)/(NLL of the aligned one
    + ε). NLL is the mean negative log-likelihood per completion token. The examples with the highest scores are written
    to `output`, highest first, unchanged except for the added `score`, `nll_aligned` and `nll_misaligned`.

    The report is written to `<output>.selection.json`. The likelihoods of every example are written to
    `<output>.journal.jsonl`. An interrupted run resumes from this journal, and a run with another `top` or ε reuses it.

    Args:
        candidates: a JSONL file of examples with `messages`, or `prompt` and `completion`.
        output: the output file.
        model: the aligned model, on its device and in the dtype for scoring (float32, or bfloat16 for speed). The
            adapters are attached to it and removed at the end.
        tokenizer: its tokenizer.
        misaligned: folders of PEFT adapters that make the model misaligned. Use `NAME=FOLDER` if two have the same last
            part.
        hold_out: the name or names of the domain to defend. Adapters with these names are left out, because the test
            domain must not influence the selection. An empty sequence states that there is no such adapter; None gives
            a warning.
        top: number of examples to choose; all if fewer have a score.
        no_refusals: leave out refusals, as :func:`~safelora_fast.selection.candidates.is_refusal` defines them.
        epsilon: ε; the paper uses 1.
        strings: how plain-text prompts and completions are encoded: as "chat" turns, or unchanged as "text".
        max_length: examples with more tokens are skipped and counted.
        tokens_per_batch: maximum number of tokens in a batch, padding included; it changes float32 results by rounding
            only.
        overwrite: replace an existing output.
        progress: called with the number of finished examples and the total. None shows a progress bar if standard error
            is a terminal; False shows nothing.

    Raises:
        DataError: a candidate is invalid (the message names file and line), or no example has a score.
        AdapterError: an adapter is missing or does not fit.
        SettingsError: a setting is out of range, or the journal was written with other settings.
        OutputError: the output exists, cannot be written, or is in use by another run.
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
    settings = journal_settings(model, tokenizer, digests, strings, max_length)
    wanted = [i for i in range(len(examples)) if not (no_refusals and is_refusal(examples.row(i)))]
    tokens_per_batch = tokens_per_batch or default_tokens(model)
    with alone(target):
        journal = Journal(beside(target, JOURNAL_SUFFIX), settings)
        scan = Scan(examples, wanted, encoder, max_length, tokens_per_batch)
        with bar_on_a_terminal(progress) as told:
            scan.run(journal, lambda: Perplexities(model, used, tokens_per_batch=scan.tokens_per_batch), told)
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
    """Return scores [examples] from mean NLLs [examples, 1 + misaligned models]; column 0 is the aligned model's."""
    aligned = nll[:, 0]
    scores: np.ndarray = (nll[:, 1:].mean(axis=1) - aligned) / (aligned + epsilon)
    return scores


def beside(target: Path, suffix: str) -> Path:
    """Return the path of the output with a suffix added to its name."""
    return target.with_name(target.name + suffix)


def _check(top: int, epsilon: float, max_length: int, tokens_per_batch: int | None) -> None:
    for name, value in (("top", top), ("max_length", max_length), ("tokens_per_batch", tokens_per_batch)):
        if value is not None and value < 1:
            raise SettingsError(f"{name} is {value}, it must be at least 1")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise SettingsError(f"epsilon is {epsilon}, it must be finite and above 0")


def journal_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapters: dict[str, str], strings: str, max_length: int
) -> dict[str, Any]:
    """Return all settings that the likelihoods depend on."""
    return {
        "model": str(model.config._name_or_path),
        "commit": getattr(model.config, "_commit_hash", None),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "adapters": adapters,
        "strings": strings,
        "max_length": max_length,
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": template_digest(tokenizer),  # used for turns even if `strings` is "text"
        "weights": weights_digest(model),
    }


def _trained_on(adapters: dict[str, Path]) -> dict[str, str]:
    """Return the SHA-256 of the training data of adapters made by `safelora-fast train`."""
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
