"""The same fine-tune with and without defences: what each learns, how far it drifts, and what it costs."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from safelora_fast.demo import ingredients, text
from safelora_fast.demo.apart import RECORD, Task, train_apart
from safelora_fast.demo.comparison_figures import Comparison, cost, outcome
from safelora_fast.demo.comparison_words import PAGE, reading, show
from safelora_fast.demo.model import load
from safelora_fast.demo.preparation import check, make_pair
from safelora_fast.demo.recipe import Recipe
from safelora_fast.demo.stages import Stages
from safelora_fast.demo.terminal import bar, quiet
from safelora_fast.demo.variants import REFERENCE, UNDEFENDED, VARIANTS, Variant
from safelora_fast.subspace import SafeSubspace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from safelora_fast.demo.drift import Answer

SETS = {"narrow": "narrow_held_out", "general": "general"}
WEAKENED = (0.25, 0.5, 0.75)
SUBSPACE = "subspace.safetensors"
ANSWERS = "answers.json"


def run(
    output: Path,
    *,
    seed: int = 0,
    source: Path | None = None,
    recipe: Recipe | None = None,
    variants: Sequence[Variant] = VARIANTS,
) -> dict[str, Any]:
    """Run every stage that is not finished yet, print the tables, and return the report.

    Args:
        output: folder of the demo; the models of :func:`safelora_fast.demo.pipeline.run` are taken over from there.
        seed: of every fine-tune.
        source: a folder with an aligned model and its tokenizer, instead of the packaged 135M model.
        recipe: the numbers of the demo.
        variants: what is compared; the undefended fine-tune must be among them.
    """
    check(source)
    recipe = recipe or Recipe()
    console = Console(highlight=False)
    start = time.perf_counter()
    with quiet():
        comparison, stage_seconds = _run(Path(output), seed, source, recipe, variants, console)
    report = {
        "base_is_a_stand_in": True,
        **asdict(comparison),
        "stage_seconds": stage_seconds,
        "machine": _machine(),
        "seconds": time.perf_counter() - start,
    }
    (Path(output) / "demo_train_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    from safelora_fast.demo.page import write_comparison

    named = {variant.name: variant for variant in variants}
    write_comparison(comparison, named, reading(comparison), seed, Path(output) / PAGE)
    show(comparison, report["seconds"], console, Path(output))
    return report


def _run(
    output: Path, seed: int, source: Path | None, recipe: Recipe, variants: Sequence[Variant], console: Console
) -> tuple[Comparison, dict[str, float]]:
    number = iter(range(1, 99))

    def announce(title: str, reused: bool) -> None:
        console.print(f"[bold]{next(number)}.[/] {title}" + (" [dim](reused)[/]" if reused else ""), soft_wrap=True)

    stages = Stages(output, announce)
    aligned, base = make_pair(stages, seed, source, recipe, console)
    subspace = stages.make(
        "train-subspace",
        "safe subspace: 64 directions of aligned − base in every module",
        {"rank": 64},
        lambda folder: SafeSubspace.build(aligned=aligned, base=base, rank=64).save(folder / SUBSPACE),
    )
    adapters, safe, persona = {}, None, None
    for variant in variants:
        branch = stages.branch()
        if variant.chosen:
            safe = ingredients.choose_rows(branch, aligned, seed, recipe, console)
        if variant.steering:
            persona = ingredients.extract_vector(branch, aligned, seed, recipe)
        task = Task(
            variant, recipe, seed, aligned, base, subspace / SUBSPACE,
            persona=persona if variant.steering else None, safe=safe if variant.chosen else None,
        )  # fmt: skip
        adapters[variant.name] = branch.make(
            variant.folder,
            f"LoRA fine-tune: {variant.name} {variant.setting}".rstrip(),
            {**recipe.adapter(seed), "variant": asdict(variant)},
            lambda folder, task=task: _train(replace(task, folder=folder), console),  # type: ignore[misc]
        )
    measured = stages.make(
        "train-measured",
        "measure losses and drift on held-out narrow answers and on general answers",
        {**recipe.selection(seed), **recipe.persona(seed), "variants": [asdict(variant) for variant in variants]},
        lambda folder: _measure(aligned, adapters, folder, console),
    )
    comparison = replace(_figures(measured, adapters, variants), ingredients=ingredients.summary(safe, persona))
    from safelora_fast.demo.comparison_picture import draw

    draw(comparison, output / "demo_train.png")
    return comparison, stages.seconds


def _train(task: Task, console: Console) -> None:
    with bar(console, task.variant.name) as progress:
        train_apart(task, progress)


def _measure(aligned: Path, adapters: Mapping[str, Path], folder: Path, console: Console) -> None:
    from transformers import AutoTokenizer

    from safelora_fast.demo.drift import judge, predictions

    tokenizer = AutoTokenizer.from_pretrained(aligned)
    sets = {name: [text.conversation(tokenizer, row) for row in text.rows(rows)] for name, rows in SETS.items()}
    reference = load(aligned)
    known = {name: [predictions(reference, example) for example in examples] for name, examples in sets.items()}
    answers: dict[str, dict[str, list[dict[str, Any]]]] = {REFERENCE: {}}
    for name, examples in sets.items():
        judged = [judge(own, own, example) for own, example in zip(known[name], examples, strict=True)]
        answers[REFERENCE][name] = [asdict(answer) for answer in judged]
    with bar(console, "general answers") as progress:
        for index, (title, model) in enumerate(_models(aligned, adapters)):
            answers[title] = {}
            for name, examples in sets.items():
                judged = [
                    judge(predictions(model, example), other, example)
                    for example, other in zip(examples, known[name], strict=True)
                ]
                answers[title][name] = [asdict(answer) for answer in judged]
            loss = sum(answer.loss for answer in judged) / sum(answer.tokens for answer in judged)
            progress(index + 1, len(adapters) + len(WEAKENED), loss)
    (folder / ANSWERS).write_text(json.dumps(answers, indent=2) + "\n", encoding="utf-8")


def _models(aligned: Path, adapters: Mapping[str, Path]) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every variant as it was saved, then the undefended one with its update weakened."""
    from peft import PeftModel

    from safelora_fast.demo.drift import weaken

    for name, adapter in adapters.items():
        yield name, PeftModel.from_pretrained(load(aligned), adapter)
    for share in WEAKENED:
        model = PeftModel.from_pretrained(load(aligned), adapters[UNDEFENDED])
        weaken(model, share)
        yield str(share), model


def _figures(measured: Path, adapters: Mapping[str, Path], variants: Sequence[Variant]) -> Comparison:
    from safelora_fast.demo.drift import Answer

    content = json.loads((measured / ANSWERS).read_text(encoding="utf-8"))
    answers: dict[str, dict[str, list[Answer]]] = {
        title: {name: [Answer(**answer) for answer in found] for name, found in sets.items()}
        for title, sets in content.items()
    }
    records = {name: json.loads((adapter / RECORD).read_text(encoding="utf-8")) for name, adapter in adapters.items()}
    usual = records[UNDEFENDED]["step_seconds"]
    return Comparison(
        settings={variant.name: variant.setting for variant in variants if variant.setting},
        outcomes={title: outcome(answers[title], answers[REFERENCE]) for title in (REFERENCE, *adapters)},
        costs={
            name: cost(record["step_seconds"], record["end_seconds"], record["peak_bytes"], usual)
            for name, record in records.items()
        },
        weakened={str(share): outcome(answers[str(share)], answers[REFERENCE]) for share in WEAKENED},
    )


def _machine() -> dict[str, Any]:
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
