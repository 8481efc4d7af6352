"""`demo --train`: what the comparison needs is made, then `safelora-fast compare` runs on the packaged configuration."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from rich.console import Console

from safelora_fast.demo import text
from safelora_fast.demo.constants import Recipe
from safelora_fast.demo.packaged_model import load
from safelora_fast.demo.preparation import check, make_pair, train_adapter
from safelora_fast.demo.stages import Stages
from safelora_fast.demo.terminal import bar, quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safelora_fast.compare.config import CompareConfig

CONFIGURATION = "compare.yaml"
OTHER = "narrow_other"
MISALIGNED = "announcements"


def configure(
    output: Path,
    *,
    seed: int = 0,
    source: Path | None = None,
    recipe: Recipe | None = None,
    configuration: str | None = None,
    overrides: Sequence[str] = (),
) -> CompareConfig:
    """Make what the comparison needs and is not there yet, and write its configuration to the folder of the demo.

    Args:
        output: folder of the demo; the models of :func:`safelora_fast.demo.pipeline.run` are taken over from there.
        seed: of every fine-tune.
        source: a folder with an aligned model and its tokenizer, instead of the packaged 135M model.
        recipe: the numbers of the demo.
        configuration: text of a configuration with placeholders, instead of the packaged one.
        overrides: settings put on top, as for `safelora-fast compare`.

    Raises:
        MissingDependencyError, OutputError: as :func:`safelora_fast.demo.run`.
    """
    from safelora_fast.recipe.signatures import check_packages

    check(source)
    check_packages("demo --train")
    from safelora_fast.compare.config import load_config

    output = Path(output).absolute()
    console = Console(highlight=False)
    if configuration is None:
        configuration = (files("safelora_fast.demo") / CONFIGURATION).read_text(encoding="utf-8")
    written = output / CONFIGURATION
    with quiet(), as_file(text.DATA) as data:
        ingredients = Ingredients(output, Path(data), seed, source, recipe or Recipe(), console)
        written.write_text(Template(configuration).substitute(ingredients), encoding="utf-8")
    return load_config(written, overrides)


class Ingredients(dict[str, Any]):
    """What the placeholders of a configuration stand for; each is made when it is first asked for."""

    def __init__(
        self, output: Path, data: Path, seed: int, source: Path | None, recipe: Recipe, console: Console
    ) -> None:
        number = iter(range(1, 99))

        def announce(title: str, reused: bool) -> None:
            console.print(f"[bold]{next(number)}.[/] {title}" + (" [dim](reused)[/]" if reused else ""), soft_wrap=True)

        stages = Stages(output, announce)
        aligned, base = make_pair(stages, seed, source, recipe, console)
        super().__init__(output=output, data=data, seed=seed, aligned=Path(aligned).absolute(), base=base)
        self._make: dict[str, Callable[[], Any]] = {
            "subspace": lambda: _build_subspace(stages.branch(), aligned, base),
            "chosen": lambda: _choose(stages.branch(), aligned, seed, recipe, console),
            "persona": lambda: _extract(stages.branch(), aligned, seed, recipe),
            "layer": lambda: _layer(self["persona"]),
        }

    def __missing__(self, name: str) -> Any:
        self[name] = self._make[name]()
        return self[name]


def _build_subspace(stages: Stages, aligned: Path, base: Path) -> Path:
    from safelora_fast.subspace.safe_subspace import SafeSubspace

    name = "subspace.safetensors"
    made = stages.make(
        "train-subspace",
        "safe subspace: 64 directions of aligned − base in every module",
        {"rank": 64},
        lambda folder: SafeSubspace.build(aligned=aligned, base=base, rank=64, progress=False).save(folder / name),
    )
    return made / name


def _choose(stages: Stages, aligned: Path, seed: int, recipe: Recipe, console: Console) -> Path:
    """Safe examples that an adapter of another narrow set finds least likely beside the aligned model."""
    from transformers import AutoTokenizer

    from safelora_fast.selection import select_by_perplexity_gap

    def train(folder: Path) -> None:
        with bar(console, MISALIGNED) as progress:
            train_adapter(aligned, folder, seed, recipe, progress, narrow=OTHER)

    def select(folder: Path) -> None:
        rows = [row for name in ("safe", "safe_pool") for row in text.rows(name)]
        lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}, ensure_ascii=False) for row in rows]
        (folder / "candidates.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        select_by_perplexity_gap(
            folder / "candidates.jsonl", folder / name, model=load(aligned),
            tokenizer=AutoTokenizer.from_pretrained(aligned),
            misaligned=[f"{MISALIGNED}={other}"], hold_out=(),  # that of the narrow answers takes no part
            top=recipe.chosen, no_refusals=True,
        )  # fmt: skip

    name = "chosen.jsonl"
    other = stages.make(
        "train-other-adapter",
        "another adapter, for Interleaving++: 48 answers in the manner of station announcements",
        {**recipe.adapter(seed), "rows": OTHER},
        train,
    )
    title = f"choose {recipe.chosen} safe examples by the perplexity gap, without refusals"
    return stages.make("train-selection", title, recipe.selection(seed), select) / name


def _extract(stages: Stages, aligned: Path, seed: int, recipe: Recipe) -> Path:
    """A persona vector of the narrow answers' manner, from the model's own answers to a few questions."""
    from safelora_fast.persona import extract_persona_vector

    def extract(folder: Path) -> None:
        with text.file("lighthouse.yaml") as trait:
            extract_persona_vector(
                aligned, trait, output=folder / name, seed=seed, max_new_tokens=recipe.persona_tokens, dtype="float32"
            )

    name = "persona.safetensors"
    made = stages.make(
        "train-persona",
        "persona vector, for steering: the manner of a lighthouse log, from 32 answers of the model itself",
        recipe.persona(seed),
        extract,
    )
    return made / name


def _layer(persona: Path) -> int:
    """The layer that the vector suggests, or the last of its candidates where it could not be measured."""
    from safelora_fast.persona_vector import PersonaVector

    vector = PersonaVector.load(persona)
    return vector.candidates[-1] if vector.suggestion is None else vector.suggestion
