"""Every kind of file that other programs may write, with a valid sample and its reader, for fuzzing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hostile_files import of_json, of_lines, of_yaml
from made_comparisons import usual
from misaligned import candidates, load, setting
from personas import save_persona
from plain_pair import write_pair
from safetensors.numpy import save_file
from tiny_recipe import tiny_rows, write_recipe

from safelora_fast import PersonaVector, SafeSubspace, project_adapter, select_by_perplexity_gap

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path


@dataclass(frozen=True)
class HostileKind:
    """A kind of file: its name, its path, its mutation, and its reader."""

    name: str
    path: Path
    content: Callable[[random.Random], bytes]
    read: Callable[[Path], Any]


def kinds(folder: Path) -> Iterator[HostileKind]:
    """Yield all kinds; each is created when it is reached."""
    for name, make in GROUPS.items():
        inside = folder / name
        inside.mkdir()
        yield from make(inside)


def _json(name: str, path: Path, read: Callable[[Path], Any], document: Any = None) -> HostileKind:
    document = json.loads(path.read_text()) if document is None else document
    return HostileKind(name, path, lambda chance: of_json(document, chance), read)


def _projection(folder: Path) -> Iterator[HostileKind]:
    pair = write_pair(folder / "in")

    def project(_: Path) -> None:
        report = project_adapter(
            pair.adapter, aligned=pair.aligned, base=pair.base, output=folder / "out", overwrite=True
        )
        json.dumps(report.to_dict())

    yield _json("adapter_config.json", pair.adapter / "adapter_config.json", project)
    config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4, "text_config": {"model_type": "x", "head_dim": 4},
              "tie_word_embeddings": False, "quantization_config": {"quant_method": "none"}, "architectures": ["A"]}  # fmt: skip
    yield _json("config.json", pair.aligned / "config.json", project, config)
    index = next(pair.aligned.glob("*.index.json"))
    yield _json("index.json", index, project)


def _vectors(folder: Path) -> Iterator[HostileKind]:
    pair = write_pair(folder / "in")
    subspace = folder / "subspace.safetensors"
    SafeSubspace.build(aligned=pair.aligned, base=pair.base, rank=2).save(subspace)
    persona = save_persona(folder / "persona.safetensors")

    def with_metadata(path: Path) -> Callable[[random.Random], bytes]:
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            ((name, text),) = file.metadata().items()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is not a mapping

        def content(chance: random.Random) -> bytes:
            changed = of_json(json.loads(text), chance).decode(errors="replace")
            save_file(tensors, folder / "made", metadata={name: changed})
            return (folder / "made").read_bytes()

        return content

    yield HostileKind("subspace", subspace, with_metadata(subspace), _shown_subspace)
    yield HostileKind("persona vector", persona, with_metadata(persona), _shown_persona)


def _shown_subspace(path: Path) -> None:
    from safelora_fast.checkpoints.provenance import reopen
    from safelora_fast.cli.subspace import show

    json.dumps(SafeSubspace.load(path).to_dict())
    show(path)
    subspace = SafeSubspace.load(path)
    for role in ("aligned", "base"):
        reopen(subspace.sources.get(role, {}), role=role)


def _shown_persona(path: Path) -> None:
    from safelora_fast.cli.persona import show

    json.dumps(PersonaVector.load(path).to_dict())
    show(path)


def _evaluation(folder: Path) -> Iterator[HostileKind]:
    from safelora_fast.data.pairs import read_pairs
    from safelora_fast.judging.answers import Answer, Asked, read_answers
    from safelora_fast.judging.benchmark_results import Metric, TaskResult, read_results
    from safelora_fast.judging.evaluation_folder import EvaluationFolder
    from safelora_fast.judging.operator_swap import read, write
    from safelora_fast.judging.verdicts import Judged, Rating, Verdict

    answers = [Answer(Asked("a", "k", 0, number, "why?"), "yes").to_row() for number in range(3)]
    lines = folder / "answers.jsonl"
    yield HostileKind("answers", lines, lambda chance: of_lines(answers, chance), read_answers)
    stored = EvaluationFolder(folder)
    yield HostileKind("stored answers", lines, lambda chance: of_lines(answers, chance), lambda _: stored.stored())
    pairs = [{"theme": "t", "question": f"q{number}", "aligned": "a", "misaligned": "b"} for number in range(3)]
    yield HostileKind("pairs", folder / "pairs.jsonl", lambda chance: of_lines(pairs, chance), read_pairs)
    settings = {"model": "m", "seed": 0, "questions": [{"id": "a"}]}
    yield _json(
        "evaluation.json", folder / "evaluation.json", lambda _: stored.other(settings), {"format": 1, **settings}
    )
    task = asdict(TaskResult("t", (Metric("acc", "none", 0.5, 0.1, 3, True),), "1", 0, False, "0.4", "ab"))
    kept = {"settings": {"format": 1, "limit": 3}, "tasks": {"t": task}}
    yield _json(
        "benchmarks.json",
        folder / "benchmarks.json",
        lambda path: read_results(path, {"limit": 3}, {}, overwrite=False),
        kept,
    )
    write(folder, "easy", 3, 3, 0)
    yield _json("operator_swap.json", folder / "operator_swap.json", lambda _: read(folder))
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    yield HostileKind(
        "held_out.jsonl", folder / "held_out.jsonl", lambda chance: of_lines(rows, chance), lambda _: read(folder)
    )
    try:
        from safelora_fast.judging.judge import VerdictStore
    except ModuleNotFoundError:
        return
    judged = Judged(Verdict("a", "k", 10.0, 90.0), Rating(10.0, "number"), Rating(90.0, "number"))
    verdicts = [{"key": f"{number}", "judge": "j", "id": "a", **asdict(judged)} for number in range(3)]
    path = folder / "verdicts.jsonl"
    yield HostileKind("verdicts", path, lambda chance: of_lines(verdicts, chance), VerdictStore)


def _yaml(folder: Path) -> Iterator[HostileKind]:
    from safelora_fast.compare.config import load_config
    from safelora_fast.judging.questions import read_questions
    from safelora_fast.persona.trait import load_trait
    from safelora_fast.recipe.recipe import load_recipe

    recipe = write_recipe(folder / "recipe", monitors={"m": {"vector": "v.safetensors", "layer": 1}}).path
    text = recipe.read_text()
    yield HostileKind("recipe", recipe, lambda chance: of_yaml(text, chance), lambda path: load_recipe(path).resolved())
    compare = (
        "title: t\nrecipe:\n  model: {path: m}\n  data: {path: d}\nseeds: [0, 1]\nruns:\n  none: {}\n"
        "  kl: {defenses: {kl: {weight: 1}}}\n"
        "  done: {adapters: {0: x}}\nmeasure: {margin: {pairs: p}, narrow: n, judge: {model: x/y}}\noutput: out\n"
    )
    path = folder / "compare.yaml"
    yield HostileKind("compare", path, lambda chance: of_yaml(compare, chance), load_config)
    trait = "name: t\ndescription: d\npairs:\n- {positive: p, negative: n}\nquestions: [why, how]\n"
    yield HostileKind("trait", folder / "trait.yaml", lambda chance: of_yaml(trait, chance), load_trait)
    questions = (
        "- {id: a, paraphrases: [why, how], system: s, kind: k}\n- {id: b, type: free_form_0, paraphrases: [x]}\n"
    )
    yield HostileKind("questions", folder / "q.yaml", lambda chance: of_yaml(questions, chance), read_questions)


def _records(folder: Path) -> Iterator[HostileKind]:
    from safelora_fast.cli.train import _show_record
    from safelora_fast.compare.assemble import costs_of
    from safelora_fast.compare.runs import Run
    from safelora_fast.compare.train_runs import Training
    from safelora_fast.recipe.recipe import load_recipe
    from safelora_fast.recipe.run_folder import RunFolder

    recipe = load_recipe(write_recipe(folder / "made").path)
    run = RunFolder(recipe)
    record = {"format": 1, "finished": True, "recipe": recipe.resolved(), "data": {"train": "ab", "held_out": None, "safe": None},
              "steps": 6, "seconds": 2.5, "step_seconds": 0.5, "peak_bytes": {"resident": 10**9, "gpu": None},
              "metrics": {"loss": {"first": 2.0, "last": None, "mean": 1.5}}, "projection": {"warnings": ["w"]}}  # fmt: skip
    run.begin(record, anew=True)

    def read(_: Path) -> None:
        found = run.read_record()
        run.changes(recipe.resolved(), "recipe")
        run.changes({"train": "cd"}, "data")
        Training(Run("kl", 0, run.path, run.path), recipe, "kl").missing()
        costs_of(found, found)
        if found.get("finished"):
            _show_record(found, run.path, as_json=False, talks=True)

    yield _json("run record", run.path / "safelora_train.json", read, record)
    sealed = run.path / "checkpoints" / "checkpoint-2"
    sealed.mkdir()
    seal = {"step": 2, "seconds": 1.5}
    yield _json("seal", sealed / "safelora_checkpoint.json", lambda _: run.last_checkpoint(), seal)


def _models(folder: Path) -> Iterator[HostileKind]:
    from safelora_fast.models.generate import generate
    from safelora_fast.models.load import load_subject
    from safelora_fast.models.model_settings import SubjectSettings

    made = setting(folder / "made", 2)
    settings = SubjectSettings(str(made / "model"), "float32", "cpu")

    def answer(adapter: Path | None) -> None:
        subject = load_subject(settings, adapter)
        turns = [[{"role": "user", "content": "why?"}]]
        list(generate(subject.model, subject.tokenizer, turns, max_tokens=2, temperature=0))

    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        yield _json(f"{name} of a model", made / "model" / name, lambda _: answer(None))
    adapter = made / "security"
    yield _json("adapter_config.json of a loaded model", adapter / "adapter_config.json", lambda _: answer(adapter))


def _selection(folder: Path) -> Iterator[HostileKind]:
    made = setting(folder / "made", 6)
    model, words = load(made)
    output = folder / "chosen.jsonl"
    journal = folder / "chosen.jsonl.journal.jsonl"

    def select(_: Path) -> None:
        found = select_by_perplexity_gap(
            made / "candidates.jsonl", output, model=model, tokenizer=words, misaligned=[made / "security"], hold_out=(),
            overwrite=True,
        )  # fmt: skip
        found.lines()
        json.dumps(found.to_dict())

    select(journal)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    yield HostileKind("select journal", journal, lambda chance: of_lines(lines, chance), select)
    rows = candidates(6)
    source = made / "candidates.jsonl"
    yield HostileKind("candidates", source, lambda chance: of_lines(rows, chance), _candidates)


def _candidates(path: Path) -> None:
    from safelora_fast.selection.candidates import Candidates, is_refusal

    found = Candidates(path)
    for index in range(len(found)):
        is_refusal(found.row(index))
        found.with_values(index, {"score": 1.0}).encode()


def _persona(folder: Path) -> Iterator[HostileKind]:
    from personas import tiny_trait

    from safelora_fast.persona.response_filter import keep, read_scores
    from safelora_fast.persona.responses import Journal, Response, requests

    wanted = requests(tiny_trait(), 1)
    made = {"model": "m", "seed": 0, "weights": "ab"}
    responses = [Response(request, (1, 2, 3), "yes") for request in wanted]
    journal = Journal(folder / "mean.responses.jsonl", made)
    rows = [journal.to_row(response) for response in responses]
    yield HostileKind("responses", journal.path, lambda chance: of_lines(rows, chance), lambda _: journal.read(wanted))
    scores = [{"id": request.id, "score": 60.0} for request in wanted]

    def judge(path: Path) -> None:
        keep(responses, read_scores(path), 50.0)

    yield HostileKind("scores", folder / "scores.jsonl", lambda chance: of_lines(scores, chance), judge)


def _rows(folder: Path) -> Iterator[HostileKind]:
    from safelora_fast.data.rows import read_rows

    rows = [{**row, "score": 0.5} for row in (*tiny_rows(3), *candidates(3))]
    path = folder / "rows.jsonl"
    yield HostileKind("rows", path, lambda chance: of_lines(rows, chance), lambda path: read_rows(str(path)))
    yield HostileKind(
        "best rows", path, lambda chance: of_lines(rows, chance), lambda path: read_rows(str(path), best=2)
    )


def _reports(folder: Path) -> Iterator[HostileKind]:
    from safelora_fast.compare.report import read_report

    path = folder / "report.json"
    yield _json("comparison report", path, lambda path: read_report(path).to_dict(), usual().to_dict())


GROUPS = {
    "projection": _projection,
    "vectors": _vectors,
    "evaluation": _evaluation,
    "yaml": _yaml,
    "records": _records,
    "models": _models,
    "selection": _selection,
    "persona": _persona,
    "rows": _rows,
    "reports": _reports,
}
