"""Digests of what measurements are made with, for their stamps: what lies under a path may change, and the path does not tell.

They are made for every cell of every report, so they are cheap, and every file is read once for as long as it stays as it is.
Small files are read as a whole; of weights, which may have hundreds of gigabytes, the pieces that a subspace's provenance is
made of: training changes nearly every weight, so they notice it at the price of a few milliseconds. A model of the Hub has no
digest: its name and revision stand in the stamp, and who fears that a branch moves names a commit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.posthoc.adapter import WEIGHTS
from safelora_fast.posthoc.provenance import sampled
from safelora_fast.recipe.digests import digest, remembered

if TYPE_CHECKING:
    from collections.abc import Iterable

TOKENIZER = (
    "tokenizer*", "*chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "*.tiktoken",
)  # fmt: skip
MODEL = ("config.json", "generation_config.json", "*.py", *TOKENIZER)
ADAPTER = ("adapter_config.json", *TOKENIZER)
KINDS = ("*.safetensors", "*.bin")  # of weights; transformers takes the first that there is
TASK = (".yaml", ".yml", ".py", ".json", ".jsonl")


def model_digest(model: str) -> str | None:
    """Of a model's weights, its code, and all that makes its tokens; None for a model of the Hub."""
    folder = Path(model).expanduser()
    return _of([*_weights(folder), *_small(folder, MODEL)]) if folder.is_dir() else None


def weights_digest(checkpoint: str) -> str | None:
    """Of the weights of a checkpoint: a folder, a file, or the index of several; None for one of the Hub."""
    path = Path(checkpoint).expanduser()
    if not path.exists():
        return None
    folder = path.parent if path.suffix == ".json" else path
    return _of(_weights(folder) if folder.is_dir() else [_weight(path)])


def adapter_digest(adapter: Path | None) -> str | None:
    """Of what is beside an adapter's weights: how they are put on the model, and its tokenizer; None for the reference."""
    return None if adapter is None else _of(_small(adapter, ADAPTER))


def tasks_digest(folder: str | None) -> str | None:
    """Of the files that define tasks of one's own, and of rows beside them."""
    path = None if folder is None else Path(folder).expanduser()
    if path is None or not path.is_dir():
        return None
    found = [file for file in path.rglob("*") if file.suffix in TASK and file.is_file()]
    return _of((str(file.relative_to(path)), digest(file)) for file in found)


def file_digest(path: str | None) -> str | None:
    """Of one file; None where none is named, or there is none."""
    file = None if path is None else Path(path).expanduser()
    return digest(file) if file is not None and file.is_file() else None


def text_digest(content: Any) -> str:
    """Of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _weights(folder: Path) -> list[tuple[str, Any]]:
    kinds = ([file for file in folder.glob(kind) if file.is_file()] for kind in KINDS)
    return [_weight(file) for file in next(filter(None, kinds), [])]


def _weight(file: Path) -> tuple[str, Any]:
    return file.name, [file.stat().st_size, remembered(file, sampled)]


def _small(folder: Path, patterns: Iterable[str]) -> list[tuple[str, Any]]:
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file() and file.name != WEIGHTS}
    return [(file.name, digest(file)) for file in found]


def _of(files: Iterable[tuple[str, Any]]) -> str:
    return text_digest(sorted(files))
