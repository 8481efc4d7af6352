"""What a run learned of the narrow task, and how far it drifted from the reference on general examples."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from safelora_fast.compare.measures.base import Measure, Metric, number
from safelora_fast.compare.report import Column
from safelora_fast.compare.statistics import Sample
from safelora_fast.data.tokens import IGNORED_LABEL
from safelora_fast.recipe.sections import Count

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from safelora_fast.compare.comparison import CompareConfig
    from safelora_fast.compare.runs import Run
    from safelora_fast.compare.workbench import Workbench
    from safelora_fast.models.load import Subject

DIVERGENCE = Column(
    "divergence", "aligned", "KL to reference", "nats", "lower",
    "KL(run ‖ reference) over the whole vocabulary on general answers, per token: how far the model has moved where the task "
    "did not ask for it.",
)  # fmt: skip
LEARNED = Column(
    "learned", "narrow", "narrow learned", "nats", "higher",
    "Fall of the loss on held-out narrow answers since the reference, per token.",
)  # fmt: skip
GENERAL_LOSS = Column(
    "general_loss", "coherent", "general loss rise", "nats", "lower",
    "Rise of the loss on general answers since the reference, per token; a stand-in for coherence if there is no judge. "
    "Training on answers of the same form can lower it.",
)  # fmt: skip


class Drift(Measure):
    """Losses on held-out narrow and on general completions, and the divergence from the reference on the latter."""

    name = title = "drift"
    order = 20
    settings = {"narrow": (str | None, None), "general": (str | None, None), "max_rows": (Count | None, None)}  # noqa: RUF012

    def check_inputs(self, config: CompareConfig) -> None:
        """Check that the data can be read."""
        from safelora_fast.data.rows import read_rows

        for rows in (config.measure.narrow, config.measure.general):
            if rows is not None:
                read_rows(rows)

    def applies(self, run: Run, config: CompareConfig) -> bool:
        """Return whether any data is configured; the same for every run."""
        del run
        return has_rows(config)

    def inputs(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Add the data to the base inputs."""
        return {**super().inputs(run, bench), **rows_inputs(bench)}

    def work(self, run: Run, bench: Workbench) -> tuple[float, float]:
        """Return the tokens of both sets; the reference's layers run once for all runs, but its head runs each time."""
        return drift_work(run, bench)

    def take(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Return the token count, loss and divergence of every completion, by set name."""
        return measure_drift(bench.subject(run.adapter), bench, run.label)

    def metrics(self, config: CompareConfig, contents: Sequence[Mapping[str, Any]]) -> Sequence[Metric]:
        """Return the metrics of the configured sets."""
        del contents
        sets = config.measure
        divergence = _per_token("general", lambda own, _other: number(own["divergence"]))
        general = [
            Metric(DIVERGENCE, divergence, never_negative=True, rank=1),
            Metric(GENERAL_LOSS, _per_token("general", lambda own, other: _loss(own) - _loss(other)), rank=1),
        ]
        narrow = [Metric(LEARNED, _per_token("narrow", lambda own, other: _loss(other) - _loss(own)))]
        return (general if sets.general is not None else []) + (narrow if sets.narrow is not None else [])


def has_rows(config: CompareConfig) -> bool:
    """Return whether narrow or general data is configured."""
    return config.measure.narrow is not None or config.measure.general is not None


def rows_inputs(bench: Workbench) -> dict[str, Any]:
    """Return what the losses depend on besides the model: the data and how its strings are read."""
    rows = {name: {"sha256": rows.sha256, "count": len(rows.rows)} for name, rows in bench.rows.items()}
    absent = {"sha256": None}  # only a report can be made without the data
    return {"strings": bench.strings, "rows": {name: rows.get(name, absent) for name in bench.row_sources}}


def drift_work(run: Run, bench: Workbench) -> tuple[float, float]:
    """Return the tokens of one measurement of drift, and those through the head."""
    layers = head = 0.0
    for name in bench.rows:
        examples = bench.examples(name, bench.tokenizer)
        layers += sum(len(example.ids) for example in examples)
        answers = sum(label != IGNORED_LABEL for example in examples for label in example.labels)
        head += answers * (2 if name == "general" and run.seed is not None else 1)
    return layers, head


def measure_drift(subject: Subject, bench: Workbench, label: str) -> dict[str, Any]:
    """Return the token count, loss and divergence of every completion, by set name.

    Losses and divergences are sums over tokens, in nats.

    Raises:
        SafeLoraFastError: an example does not fit the chat template, or there is not enough memory.
    """
    from safelora_fast.scoring.drift import answer_drift

    found = {}
    for name in bench.rows:
        examples = bench.examples(name, subject.tokenizer)
        reference = bench.reference_predictor if name == "general" and subject is not bench.reference else None
        progress = bench.counting(f"{name} answers of {label}", len(examples))
        answers = answer_drift(subject.model, reference, examples, progress=progress)
        found[name] = [asdict(answer) for answer in answers]
    return found


def _loss(answer: Mapping[str, Any]) -> float:
    return number(answer["loss"])


def _per_token(
    name: str, value: Callable[[Mapping[str, Any], Mapping[str, Any]], float]
) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Sample | None]:
    """Return a reader of one set that applies `value` to each completion of the run and of the reference."""

    def read(content: Mapping[str, Any], reference: Mapping[str, Any]) -> Sample | None:
        if name not in content or name not in reference:
            return None
        pairs = list(zip(content[name], reference[name], strict=True))
        values = tuple(value(own, other) for own, other in pairs)
        return Sample(values, tuple(float(own["tokens"]) for own, _ in pairs), tuple(map(str, range(len(pairs)))))

    return read
