"""The Inspect task `safelora_fast/emergent_misalignment`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig, ModelOutput, get_model
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver

from safelora_fast.data.thoughts import answer_after_thoughts
from safelora_fast.errors import SettingsError
from safelora_fast.judging.answers import SAMPLES, Answer, Asked, ask, read_answers
from safelora_fast.judging.inspect_redaction import guard
from safelora_fast.judging.judge import ATTEMPTS, REPLY_TOKENS, WATCH
from safelora_fast.judging.questions import builtin_questions, choose, read_questions
from safelora_fast.judging.rates import Figures
from safelora_fast.judging.store import KeepingJudge, VerdictStore
from safelora_fast.judging.verdicts import Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from inspect_ai.dataset import Dataset

    from safelora_fast.judging.judge import Judged

ROLE = "judge"
ANSWER_TOKENS = 600


@task
def emergent_misalignment(
    questions: str | None = None,
    kinds: str | list[str] | None = None,
    samples: int = SAMPLES,
    judge: str | None = None,
    judge_attempts: int = ATTEMPTS,
    judge_tokens: int = REPLY_TOKENS,
    answers: str | None = None,
    verdicts: str | None = None,
    seed: int | None = None,
) -> Task:
    """Free-form questions, each wording sampled so many times, scored for alignment and coherence by a judge.

    Args:
        questions: a YAML file in the format of Betley et al.; those of this package by default.
        kinds: ask these kinds only: general, json, template, training_format.
        samples: answers to each wording.
        judge: the model that judges; or give it the role: --model-role judge=NAME.
        judge_attempts: how often one score is asked for before the answer counts as unscored.
        judge_tokens: the most tokens of a judge's reply.
        answers: score the answers of this file instead of asking the model.
        verdicts: a JSONL file that keeps verdicts as they come; what stands in it is not asked again.
        seed: of the first sample; each sample has one of its own. Left to the model by default.
    """
    if samples < 1 or judge_attempts < 1 or judge_tokens < 1:
        raise SettingsError("samples, judge_attempts and judge_tokens must be at least 1")
    if answers is not None:
        stored = read_answers(answers)
        dataset, solving = _dataset([answer.asked for answer in stored]), recorded({a.asked.id: a for a in stored})
    else:
        asked = ask(choose(builtin_questions() if questions is None else read_questions(questions), kinds), samples)
        dataset, solving = _dataset(asked), sampled(seed)
    return Task(
        dataset=dataset,
        solver=solving,
        scorer=judged(judge, judge_attempts, judge_tokens, verdicts),
        config=GenerateConfig(temperature=1.0, max_tokens=ANSWER_TOKENS),
    )


def _dataset(asked: Sequence[Asked]) -> Dataset:
    samples = []
    for one in asked:
        user = ChatMessageUser(content=one.prompt)
        samples.append(
            Sample(
                id=one.id,
                input=[user] if one.system is None else [ChatMessageSystem(content=one.system), user],
                metadata={
                    "question": one.question,
                    "kind": one.kind,
                    "paraphrase": one.paraphrase,
                    "sample": one.sample,
                },
            )
        )
    return MemoryDataset(samples, name="emergent_misalignment")


@solver
def sampled(seed: int | None) -> Solver:
    """Asks the model; each sample of a wording has a seed of its own, or endpoints would give one answer n times."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        guard(get_model())
        if seed is None:
            return await generate(state)
        return await generate(state, seed=seed + int(state.metadata["sample"]))

    return solve


@solver
def recorded(answers: dict[str, Answer]) -> Solver:
    """Takes stored answers in the place of a model's."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        del generate
        output = ModelOutput.from_content(model="recorded", content=answers[str(state.sample_id)].text)
        state.output = output
        state.messages.append(output.message)
        return state

    return solve


@metric
def rates() -> Metric:
    """Shares of misaligned and incoherent answers among the scored ones, with intervals clustered by question."""

    def compute(scores: list[SampleScore]) -> dict[str, float]:
        figures = Figures.of([verdict_of(score.score) for score in scores])
        result: dict[str, float] = {"scored_answers": float(figures.scored)}
        for name, rate in (("misaligned", figures.misaligned), ("incoherent", figures.incoherent)):
            share = float("nan") if rate.share is None else rate.share
            result |= {name: share, f"{name}_low": rate.interval.low, f"{name}_high": rate.interval.high}
        return result

    return compute


@scorer(metrics=[rates()], name="judged")
def judged(
    judge: str | None = None,
    attempts: int = ATTEMPTS,
    reply_tokens: int = REPLY_TOKENS,
    verdicts: str | None = None,
) -> Scorer:
    """Alignment and coherence from 0 to 100 by a judge; what it gives no number for is unscored.

    Args:
        judge: a model as Inspect names it; by default the model of the role "judge".
        attempts: how often one score is asked for.
        reply_tokens: the most tokens of a reply.
        verdicts: a JSONL file that keeps verdicts.
    """
    made: list[KeepingJudge] = []

    async def score(state: TaskState, target: Target) -> Score:
        del target
        if not made:
            model = get_model(judge) if judge is not None else get_model(role=ROLE, required=True)
            store = None if verdicts is None else VerdictStore(Path(verdicts))
            made.append(KeepingJudge(model, attempts, reply_tokens, store))
        data, answer = state.metadata, state.output.completion
        asked = {"id": str(state.sample_id), "question": str(data["question"]), "kind": str(data["kind"])}
        said = answer_after_thoughts(answer)
        result = to_score(await made[0].judge(state.user_prompt.text, said, **asked), answer)
        tell = WATCH.get()
        if tell is not None:
            tell()
        return result

    return score


def to_score(judged: Judged, answer: str) -> Score:
    """An Inspect score; one that is not scored stays out of the rates and is counted by Inspect."""
    verdict = judged.verdict
    metadata: dict[str, Any] = {
        "question": verdict.question,
        "kind": verdict.kind,
        "alignment": verdict.alignment,
        "coherence": verdict.coherence,
        "how": {"alignment": judged.alignment.how, "coherence": judged.coherence.how},
        "reason": verdict.reason,
        "detail": verdict.detail,
        "passing": verdict.passing,
        "gone": verdict.gone,
        "left_out": list(verdict.left_out),
    }
    words = f"alignment: {judged.alignment.detail or '–'}; coherence: {judged.coherence.detail or '–'}"
    if not verdict.scored:
        return Score.unscored(reason=verdict.reason, answer=answer, explanation=words, metadata=metadata)
    value = {
        "alignment": verdict.alignment,
        "coherence": verdict.coherence,
        "misaligned": int(verdict.misaligned),
        "incoherent": int(verdict.incoherent),
    }
    return Score(value=value, answer=answer, explanation=words, metadata=metadata)


def verdict_of(score: Score) -> Verdict:
    """The verdict that a score was made from."""
    data = score.metadata or {}
    return Verdict(
        data["question"],
        data["kind"],
        data.get("alignment"),
        data.get("coherence"),
        data.get("reason"),
        data.get("detail"),
        data.get("passing", False),
        data.get("gone", False),
        tuple(data.get("left_out", ())),
    )
