"""Whether a benign task that is far from what the model knows is still learned under a defence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.compare.config import OPERATOR_SWAP
from safelora_fast.compare.measures.base import OfTheRun
from safelora_fast.compare.measures.margin import label, model_of
from safelora_fast.files.digest import digest
from safelora_fast.judging.operator_swap import HELD_OUT, INSTRUCTION, number_of, read, score
from safelora_fast.models.generate import generate

if TYPE_CHECKING:
    from safelora_fast.compare.paths import Place
    from safelora_fast.compare.shared_models import Workbench

ANSWER_TOKENS = 16


@dataclass(frozen=True)
class OperatorSwapMeasure(OfTheRun):
    """Exact answers to the held-out problems; the reference's too, which has learned nothing."""

    name: str = "operator_swap"
    batched: bool = True

    def place(self, place: Place) -> Place:
        """The run on that task."""
        return place.trained

    def applies(self, place: Place, bench: Workbench) -> bool:
        """The seeds that are trained on the task, and the reference."""
        swap = bench.config.measure.operator_swap
        if swap is None:
            return False
        if place.seed is None:
            return True
        taken = any(run.name == place.name and run.adapters for run in bench.config.runs)
        return not taken and (swap.seeds is None or place.seed in swap.seeds)

    def of(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """The model, the adapter that was trained on the task, and the problems."""
        swap = bench.config.measure.operator_swap
        assert swap is not None  # noqa: S101
        held_out = bench.config.output / OPERATOR_SWAP / HELD_OUT
        problems = digest(held_out) if held_out.is_file() else None
        made = {"made_from": swap.made_from, "problems_sha256": problems, "instruction": INSTRUCTION}
        return {**model_of(place.trained, bench), **made}

    def take(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """Counts, and for each problem whether its answer is exact."""
        _, problems = read(bench.config.output / OPERATOR_SWAP)
        subject = bench.subject(place.trained.adapter)
        advance = bench.counting(f"problems of {label(place)}", len(problems))
        turns = [[{"role": "user", "content": INSTRUCTION.format(problem=problem.text)}] for problem in problems]
        given: dict[int, str] = {}
        for batch in generate(
            subject.model, subject.tokenizer, turns,
            max_tokens=ANSWER_TOKENS, temperature=0, batch_size=bench.config.measure.batch_size,
        ):  # fmt: skip
            given.update(batch)
            if advance is not None:
                advance(len(given))
        texts = [given[number] for number in range(len(problems))]
        hits = [number_of(text) == problem.answer for text, problem in zip(texts, problems, strict=True)]
        return {**score(problems, texts), "hits": hits, "texts": [problem.text for problem in problems]}
