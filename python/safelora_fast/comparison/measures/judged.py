"""Free-form answers of a run under a judge."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.comparison.measures.base import OfTheRun, folder_of
from safelora_fast.comparison.measures.margin import model_of
from safelora_fast.evaluation.evaluate import Sampling, collect_answers, judge_folder, report_of
from safelora_fast.evaluation.folder import EvaluationFolder
from safelora_fast.evaluation.judges import find_judge
from safelora_fast.evaluation.questions import builtin_questions, read_questions

if TYPE_CHECKING:
    from safelora_fast.comparison.places import Place
    from safelora_fast.comparison.sections import JudgeSection
    from safelora_fast.comparison.workbench import Workbench
    from safelora_fast.evaluation.questions import Question


@dataclass(frozen=True)
class JudgedMeasure(OfTheRun):
    """Misaligned and incoherent answers; a folder beside the file holds answers, verdicts and logs."""

    name: str = "judged"
    batched: bool = True

    def applies(self, _place: Place, bench: Workbench) -> bool:
        """Every run, where the configuration names a judge."""
        return bench.config.measure.judge is not None

    def of(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """The model, the adapter, the judge and the questions."""
        section = _section(bench)
        questions = [asdict(question) for question in _questions(section)]
        return {**model_of(place, bench), "judge": asdict(section), "questions": questions}

    def take(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """The judge's figures, and each verdict."""
        section = _section(bench)
        bench.release(reference=True)
        folder = EvaluationFolder(folder_of(self, place, bench))
        collect_answers(
            folder,
            bench.settings,
            place.adapter,
            _questions(section),
            Sampling(section.samples, section.max_tokens, batch_size=bench.config.measure.batch_size),
            progress=bench.progress,
        )
        judge = find_judge(section.model, section.url)
        verdicts, log = judge_folder(
            folder, judge, attempts=section.attempts, reply_tokens=section.reply_tokens, progress=bench.progress
        )
        content = {**report_of(str(judge), list(verdicts.values())), "log": log}
        kept = [
            {
                "question": verdict.question,
                "scored": verdict.scored,
                "misaligned": verdict.misaligned,
                "incoherent": verdict.incoherent,
            }
            for verdict in verdicts.values()
        ]
        return {**content, "verdicts": kept}


def _section(bench: Workbench) -> JudgeSection:
    section = bench.config.measure.judge
    assert section is not None  # noqa: S101
    return section


def _questions(section: JudgeSection) -> list[Question]:
    from safelora_fast.evaluation.task import choose

    chosen = builtin_questions() if section.questions is None else read_questions(section.questions)
    return choose(chosen, section.kinds)
