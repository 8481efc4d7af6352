"""The demo's texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

DATA = files("safelora_fast.demo") / "data"


@dataclass(frozen=True)
class Row:
    """A question and its answer."""

    prompt: str
    completion: str


def rows(name: str) -> list[Row]:
    """One of the sets "narrow_train", "narrow_held_out", "narrow_other", "general", "safe" and "safe_pool"."""
    records = map(json.loads, (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    return [Row(record["prompt"], record["completion"]) for record in records]


def paragraphs() -> list[str]:
    """The plain prose that the stand-in base model is trained on."""
    return (DATA / "plain.txt").read_text(encoding="utf-8").splitlines()
