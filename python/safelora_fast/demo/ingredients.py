"""What Interleaving++ and steering need before they train: chosen safe rows, and a persona vector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.demo import text
from safelora_fast.demo.model import load
from safelora_fast.demo.preparation import train_adapter
from safelora_fast.demo.terminal import bar

if TYPE_CHECKING:
    from rich.console import Console

    from safelora_fast.demo.recipe import Recipe
    from safelora_fast.demo.stages import Stages

OTHER = "narrow_other"
CANDIDATES = "candidates.jsonl"
CHOSEN = "chosen.jsonl"
VECTOR = "persona.safetensors"
TRAIT = "lighthouse.yaml"
MISALIGNED = "announcements"


def choose_rows(stages: Stages, aligned: Path, seed: int, recipe: Recipe, console: Console) -> Path:
    """A file of safe rows that an adapter of another narrow set finds least likely beside the aligned model."""
    other = stages.make(
        "train-other-adapter",
        "another adapter, for Interleaving++: 48 answers in the manner of station announcements",
        {**recipe.adapter(seed), "rows": OTHER},
        lambda folder: _train_other(aligned, folder, seed, recipe, console),
    )
    chosen = stages.make(
        "train-selection",
        f"choose {recipe.chosen} safe rows by the perplexity gap, without refusals",
        recipe.selection(seed),
        lambda folder: _select(aligned, other, folder, recipe),
    )
    return chosen / CHOSEN


def _train_other(aligned: Path, folder: Path, seed: int, recipe: Recipe, console: Console) -> None:
    with bar(console, MISALIGNED) as progress:
        train_adapter(aligned, folder, seed, recipe, progress, narrow=OTHER)


def _select(aligned: Path, other: Path, folder: Path, recipe: Recipe) -> None:
    from transformers import AutoTokenizer

    from safelora_fast.selection import select_by_perplexity_gap

    rows = [row for name in ("safe", "safe_pool") for row in text.rows(name)]
    lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}, ensure_ascii=False) for row in rows]
    (folder / CANDIDATES).write_text("\n".join(lines) + "\n", encoding="utf-8")
    select_by_perplexity_gap(
        folder / CANDIDATES, folder / CHOSEN, model=load(aligned), tokenizer=AutoTokenizer.from_pretrained(aligned),
        misaligned=[f"{MISALIGNED}={other}"], hold_out=(),  # that of the narrow answers takes no part
        top=recipe.chosen, no_refusals=True,
    )  # fmt: skip


def extract_vector(stages: Stages, aligned: Path, seed: int, recipe: Recipe) -> Path:
    """The file of a persona vector of the narrow answers' manner, from the model's own answers to a few questions."""
    made = stages.make(
        "train-persona",
        "persona vector, for steering: the manner of a lighthouse log, from 32 answers of the model itself",
        recipe.persona(seed),
        lambda folder: _extract(aligned, folder, seed, recipe),
    )
    return made / VECTOR


def _extract(aligned: Path, folder: Path, seed: int, recipe: Recipe) -> None:
    from safelora_fast.persona import extract_persona_vector

    with text.file(TRAIT) as trait:
        extract_persona_vector(
            aligned, trait, output=folder / VECTOR, seed=seed, max_new_tokens=recipe.persona_tokens, dtype="float32"
        )


def summary(chosen: Path | None, persona: Path | None) -> dict[str, Any]:
    """What was chosen and extracted, for the report."""
    from safelora_fast.demo.variants import steered_block
    from safelora_fast.persona_vector import PersonaVector

    found: dict[str, Any] = {}
    if chosen is not None:
        report = json.loads(Path(f"{chosen}.selection.json").read_text(encoding="utf-8"))
        found["selection"] = {name: report[name] for name in ("rows", "refusals", "chosen", "cut")}
    if persona is not None:
        vector = PersonaVector.load(persona)
        block = steered_block(vector)
        separation = vector.separation[block]
        found["persona"] = {"block": block, "blocks": vector.blocks, "share": separation.share}
    return found
