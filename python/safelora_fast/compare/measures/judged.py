"""Free-form answers of a run under a judge."""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.compare.measures.base import OfTheRun, folder_of
from safelora_fast.compare.measures.margin import model_of
from safelora_fast.errors import EvaluationError, SafeLoraFastError
from safelora_fast.files.digest import text_digest
from safelora_fast.judging.evaluate import Sampling, collect_answers, judge_folder
from safelora_fast.judging.evaluation_folder import EvaluationFolder
from safelora_fast.judging.judge_names import check_judge, find_judge
from safelora_fast.judging.judge_prompts import ASPECTS, judge_prompt
from safelora_fast.judging.questions import builtin_questions, choose, read_questions
from safelora_fast.printable import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.compare.measure_sections import JudgeSection
    from safelora_fast.compare.paths import Place
    from safelora_fast.compare.shared_models import Workbench
    from safelora_fast.judging.questions import Question
    from safelora_fast.judging.verdicts import Verdict


@dataclass(frozen=True)
class JudgedMeasure(OfTheRun):
    """Misaligned and incoherent answers; a folder beside the file holds answers, verdicts and logs."""

    name: str = "judged"
    batched: bool = True

    def applies(self, _place: Place, bench: Workbench) -> bool:
        """Every run, where the configuration names a judge."""
        return bench.config.measure.judge is not None

    def of(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """The model, the adapter, the judge and what it is asked, and the questions."""
        section = _section(bench)
        questions = [asdict(question) for question in _questions(section)]
        prompts = text_digest([judge_prompt(aspect, "", "") for aspect in ASPECTS])
        return {
            **model_of(place, bench),
            "judge": section.model_dump(),
            "prompts_sha256": prompts,
            "questions": questions,
        }

    def take(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """The judge's figures, and each verdict.

        Raises:
            EvaluationError: the judge left answers without a verdict that it may give later, or is gone since another run.
                What it has scored is in the folder, and is not asked for again.
        """
        if bench.judge_gone is not None:
            raise EvaluationError(f"the judge is gone: {bench.judge_gone}")
        section = _section(bench)
        bench.release(reference=True)

        @functools.cache
        def greet() -> None:
            try:
                warning = check_judge(section.model, section.url, section.reply_tokens)
            except SafeLoraFastError as error:
                bench.judge_gone = str(error)
                raise
            if warning is not None:
                print(f"warning: {one_line(warning)}", file=sys.stderr, flush=True)

        folder = EvaluationFolder(folder_of(self, place, bench))
        collect_answers(
            folder,
            bench.settings,
            place.adapter,
            _questions(section),
            Sampling(section.samples, section.max_tokens, batch_size=bench.config.measure.batch_size),
            before=greet,
            progress=bench.progress,
        )
        found, report = judge_folder(
            folder,
            find_judge(section.model, section.url),
            attempts=section.attempts,
            reply_tokens=section.reply_tokens,
            before=greet,
            progress=bench.progress,
        )
        verdicts = list(found.values())
        _refuse_unfinished(verdicts, bench)
        kept = [
            {
                "question": verdict.question,
                "scored": verdict.scored,
                "misaligned": verdict.misaligned,
                "incoherent": verdict.incoherent,
            }
            for verdict in verdicts
        ]
        return {**report, "verdicts": kept}


def _refuse_unfinished(verdicts: Sequence[Verdict], bench: Workbench) -> None:
    """Refuse verdicts that are missing for a reason that may pass; a judge that failed as a whole is not asked again here."""
    from safelora_fast.judging.judge import FAILED

    nothing = not any(verdict.scored for verdict in verdicts)  # refusals of every request are no answer's fault
    missing = [one for one in verdicts if one.passing or (nothing and (one.reason or "").startswith(FAILED))]
    if not missing:
        return
    told = next((one for one in missing if one.detail), missing[0])
    words = ": ".join(filter(None, (told.reason, told.detail)))
    reason = f"{len(missing)} of {len(verdicts)} answers have no verdict: {words}"
    if nothing or any(one.gone for one in missing):
        bench.judge_gone = reason
    raise EvaluationError(reason)


def _section(bench: Workbench) -> JudgeSection:
    section = bench.config.measure.judge
    assert section is not None  # noqa: S101
    return section


def _questions(section: JudgeSection) -> list[Question]:
    chosen = builtin_questions() if section.questions is None else read_questions(section.questions)
    return choose(chosen, section.kinds)
