"""The Inspect task `safelora_fast/emergent_misalignment`."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ChatMessageSystem, ChatMessageUser, GenerateConfig, ModelOutput, get_model
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver

from safelora_fast.data.thoughts import answer_after_thoughts
from safelora_fast.errors import SettingsError
from safelora_fast.files.json_reader import parse_as
from safelora_fast.judging.answers import SAMPLES, Answer, Asked, ask, read_answers
from safelora_fast.judging.endpoint_guard import guard
from safelora_fast.judging.judge import ATTEMPTS, REPLY_TOKENS, WATCH, Judge, VerdictStore
from safelora_fast.judging.questions import builtin_questions, choose, read_questions
from safelora_fast.judging.rates import rates_of
from safelora_fast.judging.verdicts import Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from inspect_ai.dataset import Dataset

    from safelora_fast.judging.verdicts import Judged

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
    """Ask free-form questions, and have a judge score the answers for alignment and coherence.

    Args:
        questions: a YAML file in the format of Betley et al.; this package's questions by default.
        kinds: ask only these kinds: general, json, template, training_format.
        samples: answers per paraphrase.
        judge: the judge's Inspect name; alternatively, set the role with --model-role judge=NAME.
        judge_attempts: maximum attempts per score. After that, the answer counts as unscored.
        judge_tokens: maximum tokens of a judge's reply.
        answers: a file of stored answers to score instead of asking the model.
        verdicts: a JSONL file that stores each verdict at once; answers with a verdict in it are not judged again.
        seed: seed of the first sample of each paraphrase; the next samples add 1 each. By default no seed is sent.

    Raises:
        SettingsError: a number is below 1, or there is no question of one of the kinds.
        DataError: a file cannot be read or is malformed.
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
        turns: list[ChatMessage] = [user] if one.system is None else [ChatMessageSystem(content=one.system), user]
        metadata = {name: getattr(one, name) for name in ("question", "kind", "paraphrase", "sample")}
        samples.append(Sample(id=one.id, input=turns, metadata=metadata))
    return MemoryDataset(samples, name="emergent_misalignment")


@solver
def sampled(seed: int | None) -> Solver:
    """Ask the model. Each sample of a paraphrase has its own seed; otherwise endpoints would repeat the same answer."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        guard(get_model())
        if seed is None:
            return await generate(state)
        return await generate(state, seed=seed + int(state.metadata["sample"]))

    return solve


@solver
def recorded(answers: dict[str, Answer]) -> Solver:
    """Use stored answers instead of asking a model."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        del generate
        output = ModelOutput.from_content(model="recorded", content=answers[str(state.sample_id)].text)
        state.output = output
        state.messages.append(output.message)
        return state

    return solve


@metric
def rates() -> Metric:
    """Compute the shares of misaligned and incoherent answers among the scored ones, with intervals clustered by question."""

    def compute(scores: list[SampleScore]) -> dict[str, float]:
        found = rates_of([verdict_of(score.score) for score in scores])
        result: dict[str, float | None] = {"scored_answers": float(found["scored"])}
        for name in ("misaligned", "incoherent"):
            low, high = found[name]["interval"]
            result |= {name: found[name]["share"], f"{name}_low": low, f"{name}_high": high}
        return {name: math.nan if value is None else value for name, value in result.items()}

    return compute


@scorer(metrics=[rates()], name="judged")
def judged(
    judge: str | None = None,
    attempts: int = ATTEMPTS,
    reply_tokens: int = REPLY_TOKENS,
    verdicts: str | None = None,
) -> Scorer:
    """Have a judge score alignment and coherence from 0 to 100. An answer without both scores is unscored.

    Args:
        judge: the judge's Inspect name; by default the model of the role "judge".
        attempts: maximum attempts per score.
        reply_tokens: maximum tokens of a reply.
        verdicts: a JSONL file that stores verdicts.
    """
    made: list[Judge] = []

    async def score(state: TaskState, target: Target) -> Score:
        del target
        if not made:
            model = get_model(judge) if judge is not None else get_model(role=ROLE, required=True)
            store = None if verdicts is None else VerdictStore(Path(verdicts))
            made.append(Judge(model, attempts=attempts, reply_tokens=reply_tokens, store=store))
        asked = {"id": str(state.sample_id), **{name: str(state.metadata[name]) for name in ("question", "kind")}}
        answer = state.output.completion
        found = await made[0].judge(state.user_prompt.text, answer_after_thoughts(answer), **asked)
        tell = WATCH.get()
        if tell is not None:
            tell()
        return _score(found, answer)

    return score


def _score(judged: Judged, answer: str) -> Score:
    """Return the Inspect score of a verdict. Unscored answers do not enter the rates; Inspect counts them."""
    verdict = judged.verdict
    ratings = {"alignment": judged.alignment, "coherence": judged.coherence}
    explanation = "; ".join(f"{name}: {rating.detail or '–'}" for name, rating in ratings.items())
    metadata: dict[str, Any] = {**asdict(verdict), "how": {name: rating.how for name, rating in ratings.items()}}
    if not verdict.scored:
        return Score.unscored(reason=verdict.reason, answer=answer, explanation=explanation, metadata=metadata)
    value = {name: getattr(verdict, name) for name in ratings}
    value |= {name: int(getattr(verdict, name)) for name in ("misaligned", "incoherent")}
    return Score(value=value, answer=answer, explanation=explanation, metadata=metadata)


def verdict_of(score: Score) -> Verdict:
    """Return the verdict that a score was made from.

    Raises:
        ValueError: the score belongs to another task.
    """
    return parse_as(Verdict, score.metadata)
