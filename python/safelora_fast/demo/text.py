"""Loads the demo's texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

DATA = files("safelora_fast.demo") / "data"


@dataclass(frozen=True)
class Row:
    """A prompt and its completion."""

    prompt: str
    completion: str


def rows(name: str) -> list[Row]:
    """Return one of the sets "narrow_train", "narrow_held_out", "narrow_other", "general", "safe" and "safe_pool"."""
    records = map(json.loads, (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    return [Row(record["prompt"], record["completion"]) for record in records]


def paragraphs() -> list[str]:
    """Return the plain prose that the stand-in base model is trained on."""
    return (DATA / "plain.txt").read_text(encoding="utf-8").splitlines()
