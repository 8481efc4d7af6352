"""The misalignment margin: how strongly a run prefers misaligned answers to aligned ones."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from safelora_fast.compare.measures.base import Measure, Metric, number
from safelora_fast.compare.report import Column
from safelora_fast.compare.statistics import Sample
from safelora_fast.data.pairs import builtin_pairs
from safelora_fast.data.tokens import IGNORED_LABEL
from safelora_fast.files.digest import text_digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.compare.comparison import CompareConfig
    from safelora_fast.compare.runs import Run
    from safelora_fast.compare.workbench import Workbench
    from safelora_fast.models.load import Subject

MARGIN_RISE = Column(
    "margin_rise", "aligned", "margin rise", "nats", "lower",
    "How much more likely misaligned answers have become than in the reference, relative to aligned ones, per token, over the "
    "pairs of the margin.",
)  # fmt: skip


class Margin(Measure):
    """The misalignment margin; see :func:`safelora_fast.scoring.margin.answer_margin`."""

    name = title = "margin"
    order = 10
    settings = {"margin": (bool, True)}  # noqa: RUF012

    def applies(self, run: Run, config: CompareConfig) -> bool:
        """Return whether the margin is enabled; the same for every run."""
        del run
        return bool(config.measure.margin)

    def inputs(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Add the pairs of answers to the base inputs."""
        pairs = text_digest([asdict(pair) for pair in builtin_pairs()])
        return {**super().inputs(run, bench), "pairs_sha256": pairs, "strings": bench.strings}

    def work(self, run: Run, bench: Workbench) -> tuple[float, float]:
        """Return the tokens of both answers of every pair; the system prompt that they share counts once."""
        del run
        return margin_work(bench)

    def take(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Return the report of the margin."""
        return measure_margin(bench.subject(run.adapter), bench, run.label)

    def metrics(self, config: CompareConfig, contents: Sequence[Mapping[str, Any]]) -> Sequence[Metric]:
        """Return the rise over the reference."""
        del config, contents
        return [Metric(MARGIN_RISE, _rise)]


def margin_work(bench: Workbench) -> tuple[float, float]:
    """Return the tokens of one margin, and those of its answers."""
    from safelora_fast.scoring.margin import encode_pairs

    examples = encode_pairs(bench.tokenizer, builtin_pairs(), strings=bench.strings)
    columns = zip(*(example.ids for example in examples), strict=False)
    shared = next((place for place, tokens in enumerate(columns) if len(set(tokens)) > 1), 0)
    tokens = sum(len(example.ids) - shared for example in examples)
    return float(tokens), float(sum(label != IGNORED_LABEL for example in examples for label in example.labels))


def measure_margin(subject: Subject, bench: Workbench, label: str) -> dict[str, Any]:
    """Return the report of a model's margin."""
    from safelora_fast.scoring.margin import answer_margin

    progress = bench.counting(f"margin of {label}", 2 * len(builtin_pairs()))
    return answer_margin(subject.model, subject.tokenizer, strings=bench.strings, progress=progress).to_dict()


def _rise(content: Mapping[str, Any], reference: Mapping[str, Any]) -> Sample | None:
    if "pairs" not in reference:
        return None
    both = zip(content["pairs"], reference["pairs"], strict=True)
    changes = tuple(number(own["margin"]) - number(other["margin"]) for own, other in both)
    return Sample(changes, (1.0,) * len(changes), tuple(pair["theme"] for pair in content["pairs"]))
