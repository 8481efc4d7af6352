"""Screen training data before training: which completions lie along a persona vector, or suit a misaligned model."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from safelora_fast.data.chat import has_template
from safelora_fast.data.tokens import Encoder
from safelora_fast.defenses.steering_vector import Direction
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.files.digest import digest
from safelora_fast.files.output import alone, check_file
from safelora_fast.files.progress import bar_on_a_terminal
from safelora_fast.files.store import write_json
from safelora_fast.persona_vector import PersonaVector
from safelora_fast.screening.report import Measured, Screen, worst_of
from safelora_fast.screening.scorer import OwnCompletions, ScreenJournal, ScreenScorer
from safelora_fast.selection.candidates import Candidates
from safelora_fast.selection.perplexity import fingerprint, read_adapters
from safelora_fast.selection.scan import Scan, default_tokens
from safelora_fast.selection.select import JOURNAL_SUFFIX, beside, gap, journal_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from safelora_fast.selection.journal import Entry

GAP, NLL = "gap", "nll"
OWN_SUFFIX = ".own"
EPSILON = 1.0


def screen(
    data: str | Path,
    output: str | Path,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Sequence[str | Path] = (),
    layer: int | None = None,
    misaligned: Sequence[str | Path] = (),
    own: str | None = None,
    limits: Mapping[str, float] | None = None,
    most: float = 0.0,
    worst: int = 10,
    strings: Literal["chat", "text"] = "chat",
    max_length: int = 2048,
    tokens_per_batch: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | bool | None = None,
) -> Screen:
    """Measure every completion of a file under the model that will be trained on it. High values are suspicious.

    - Each persona vector gives a projection a(x, y)·v/‖v‖ of the mean state of completion y after prompt x at one layer.
      With `own`, it is the projection difference (a(x, y) − a(x, y′))·v/‖v‖ to the model's own completion y′, which
      predicted the trait after fine-tuning better (Chen et al., arXiv 2507.21509, data flagging).
    - Misaligned adapters give the perplexity gap (NLL of the aligned model − mean NLL of the misaligned ones)/(NLL of the
      aligned one + 1): minus the score of :func:`~safelora_fast.select_by_perplexity_gap`.
    - Without either, the measure is `nll`, the model's mean negative log-likelihood per token: how unlike its own the
      completions are. With `own`, it is the difference to that of the model's own completion.

    The report is written to `output`. The values of every example are stored in `<output>.journal.jsonl` (and
    `<output>.own.journal.jsonl`), from which an interrupted run resumes.

    Args:
        data: a JSONL file of examples with `messages`, or `prompt` and `completion`.
        output: the report, a JSON file.
        model: the model before training, on its device and in the dtype for scoring.
        tokenizer: its tokenizer.
        vectors: files of persona vectors of this model.
        layer: the layer of every vector; each vector's suggestion by default.
        misaligned: PEFT adapters that make the model misaligned; `NAME=FOLDER` names one.
        own: the column with the model's own completion of each example, as text.
        limits: by trait, "gap" or "nll": values above it are flagged.
        most: the share of examples that may be flagged, from 0 to 1.
        worst: number of examples to list for each measure.
        strings: how plain-text prompts and completions are encoded: as "chat" turns, or unchanged as "text".
        max_length: examples with more tokens are skipped and counted.
        tokens_per_batch: maximum number of tokens in a batch, padding included.
        overwrite: replace an existing report.
        progress: called with the number of finished examples and the total. None shows a progress bar if standard error
            is a terminal; False shows nothing.

    Raises:
        DataError: an example is invalid (the message names file and line), or none has a value.
        AdapterError: an adapter is missing or does not fit.
        SettingsError: a vector does not fit the model or suggests no layer, or a setting is out of range.
        OutputError: the report exists, cannot be written, or is in use by another run.
    """
    target, limits = Path(output), dict(limits or {})
    directions = _directions(vectors, layer)
    adapters = read_adapters(misaligned) if misaligned else {}
    if own is not None and adapters and not directions:
        raise SettingsError(
            "own completions have no gap to misaligned adapters: give a persona vector, or leave own out"
        )
    others = [GAP] if adapters else [] if directions else [NLL]
    _check([*directions, *others], limits, most, (worst, max_length, tokens_per_batch))
    check_file(target, [Path(data), *map(Path, vectors), *adapters.values()], overwrite=overwrite)
    files: dict[str, Candidates] = {"": Candidates(data)}
    if own is not None:
        files[OWN_SUFFIX] = OwnCompletions(data, own)
    encoder = Encoder(tokenizer, strings=strings)
    if strings == "chat" and not has_template(tokenizer):
        raise SettingsError("the model's tokenizer has no chat template: give one, or for plain text say strings text")
    if strings == "chat":
        encoder.check()
    stamps = {name: fingerprint(path) for name, path in adapters.items()}
    named = {
        trait: {"sha256": digest(Path(file)), "layer": one.layer}
        for (trait, one), file in zip(directions.items(), vectors, strict=True)
    }
    settings: dict[str, Any] = {**journal_settings(model, tokenizer, stamps, strings, max_length), "vectors": named}
    tokens = tokens_per_batch or default_tokens(model)
    found: list[dict[int, Entry]] = []
    with alone(target):
        for suffix, examples in files.items():
            used = {} if suffix else adapters
            own_settings = {**settings, "adapters": stamps if used else {}, "own": own if suffix else None}
            journal = ScreenJournal(beside(target, suffix + JOURNAL_SUFFIX), own_settings)
            make = _maker(model, tokenizer, list(directions.values()), used, tokens)
            with bar_on_a_terminal(progress) as told:
                Scan(examples, range(len(examples)), encoder, max_length, tokens).run(journal, make, told)
            found.append(journal.entries)
        report = _report(files[""], found, settings, limits, most, worst)
        write_json(target, report.to_dict())
    return report


def _directions(vectors: Sequence[str | Path], layer: int | None) -> dict[str, Direction]:
    found: dict[str, Direction] = {}
    for file in vectors:
        vector = PersonaVector.load(file)
        chosen = vector.suggestion if layer is None else layer
        if chosen is None:
            raise SettingsError(f"{file}: suggests no layer: set one (--layer)")
        if vector.trait in found or vector.trait in {GAP, NLL}:
            raise SettingsError(f"{file}: there is another measure called {vector.trait!r}; give each trait one vector")
        direction = found[vector.trait] = Direction.of(vector, chosen, owner="screen")
        if not direction.values.any():
            raise SettingsError(f"{file}: the vector of layer {chosen} is zero")
    return found


def _check(
    known: Sequence[str],
    limits: Mapping[str, float],
    most: float,
    counts: tuple[int, int, int | None],
) -> None:
    for name, limit in limits.items():
        if name not in known:
            raise SettingsError(f"there is no measure {name!r} to limit; known are {', '.join(known)}")
        if not math.isfinite(limit):
            raise SettingsError(f"the limit of {name} is {limit}, it must be finite")
    if not 0 <= most <= 1:
        raise SettingsError(f"most is {most}, it must be from 0 to 1")
    for setting, value in zip(("worst", "max_length", "tokens_per_batch"), counts, strict=True):
        if value is not None and value < 1:
            raise SettingsError(f"{setting} is {value}, it must be at least 1")


def _maker(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directions: Sequence[Direction],
    adapters: Mapping[str, Path],
    tokens: int,
) -> Callable[[], ScreenScorer]:
    return lambda: ScreenScorer(model, tokenizer, directions, adapters, tokens_per_batch=tokens)


def _report(
    examples: Candidates,
    found: Sequence[Mapping[int, Entry]],
    settings: Mapping[str, Any],
    limits: Mapping[str, float],
    most: float,
    worst: int,
) -> Screen:
    """Return the report of the entries of the data and, if there are any, of the model's own completions."""
    skipped: dict[str, list[str]] = defaultdict(list)
    scored = []
    for index in range(len(examples)):
        reasons = {entries[index].skipped for entries in found} - {None}
        if reasons:
            skipped[str(sorted(map(str, reasons))[0])].append(examples.place(index))
        else:
            scored.append(index)
    if not scored:
        raise DataError(f"{examples.source}: no example has a value ({'; '.join(skipped)})")
    given, *own = (np.array([entries[index].nll for index in scored], np.float64) for entries in found)
    measures = []

    def add(name: str, kind: str, values: np.ndarray) -> None:
        highest = worst_of(values, scored, examples, worst)
        measures.append(Measured(name, kind, values, highest, limits.get(name), most))

    for number, (trait, vector) in enumerate(settings["vectors"].items()):
        values = given[:, number] - (own[0][:, number] if own else 0.0)
        add(trait, f"projection{' difference' if own else ''} at layer {vector['layer']}", values)
    if not settings["vectors"] and not settings["adapters"]:
        what = "negative log-likelihood per token"
        add(
            NLL,
            f"{what}, above the model's own completion's" if own else what,
            given[:, 0] - (own[0][:, 0] if own else 0),
        )
    if settings["adapters"]:
        under = " and ".join(settings["adapters"])
        add(GAP, f"perplexity gap to {under}", -gap(given[:, len(settings["vectors"]) :], EPSILON))
    return Screen(examples.source, examples.sha256(), len(examples), settings, tuple(measures), dict(skipped))
