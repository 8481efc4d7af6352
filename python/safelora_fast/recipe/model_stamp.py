"""The stamp of a model on disk: digests of everything that its outputs depend on, stored with results.

A stamp covers the model's folder, the adapter with its configuration, both tokenizers, and the chat template's file.
Small files and an adapter's weights are read completely. A model's weights may take hundreds of gigabytes, so only
samples of them are read, as for a subspace's provenance. Training changes nearly every weight, so a few milliseconds
suffice to detect a change. A model on the Hub is identified by its commit. For loaded models, use
:func:`~safelora_fast.models.digests.weights_digest`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.hub import Repository
from safelora_fast.checkpoints.lora_config import CONFIG
from safelora_fast.checkpoints.provenance import sampled
from safelora_fast.checkpoints.resolver import ADAPTER_WEIGHTS, HUB_ID, model_folder
from safelora_fast.errors import CheckpointError
from safelora_fast.files.digest import digest, remembered, text_digest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from safelora_fast.recipe.recipe import Recipe

TOKENIZER = (
    "tokenizer*", "*chat_template*", "additional_chat_templates/*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "tekken.json",
)  # fmt: skip
MODEL = ("config.json", "generation_config.json", "*.py", *TOKENIZER)
ADAPTER = (CONFIG, *TOKENIZER)
KINDS = ("*.safetensors", "*.bin")  # of weight files; transformers loads the first kind that exists
CHECKPOINTS = (".aligned", ".base")  # suffixes of settings that may name a checkpoint on the Hub


def subject_stamp(model: str, adapter: Path | None = None, chat_template: str | None = None) -> dict[str, str | None]:
    """Return digests of a model on disk or on the Hub, its adapter, and a chat template's file.

    Args:
        model: a folder, or a Hub id with an optional `@revision`.
        adapter: the adapter's folder.
        chat_template: a Jinja file that replaces the tokenizer's own template.

    Returns:
        `model_sha256`, `model_commit` (one of the two is None), `adapter_sha256`, and `chat_template_sha256`. A digest
        is None if its file or folder does not exist.

    Raises:
        DataError: a small file, or an adapter's weights, cannot be read.
        CheckpointError: a model's weights cannot be read.
    """
    return {
        "model_sha256": model_digest(model),
        "model_commit": model_commit(model),
        "adapter_sha256": adapter_digest(adapter),
        "chat_template_sha256": file_digest(chat_template),
    }


def recipe_stamp(recipe: Recipe) -> dict[str, Any]:
    """Return digests of all training inputs except the data: model, chat template, and defenses' files and checkpoints.

    Returns:
        `model` (see :func:`subject_stamp`), and the digest or commit for each setting that names a file or checkpoint.

    Raises:
        DataError: a small file cannot be read.
        CheckpointError: a checkpoint cannot be read.
    """
    found: dict[str, Any] = {}
    for key, value in named_files(recipe).items():
        known = checkpoint_digest(value)
        found[key] = model_commit(value) if known is None and key.endswith(CHECKPOINTS) else known
    model = subject_stamp(recipe.model.path, None, recipe.model.chat_template)
    return {"model": model, **{key: value for key, value in found.items() if value is not None}}


def named_files(recipe: Recipe) -> dict[str, str]:
    """Return all string settings of defenses, monitors and margin by dotted key; each may name a file or checkpoint."""
    settings: dict[str, Any] = {} if recipe.margin is None else {"margin.pairs": recipe.margin.pairs}
    for section, specs in (("defenses", recipe.defenses), ("monitors", recipe.monitors)):
        for spec in specs:
            for key, value in spec.settings.items():
                inner = value if isinstance(value, dict) else {"": value}
                settings |= {
                    ".".join(filter(None, (section, spec.name, key, name))): one for name, one in inner.items()
                }
    return {key: value for key, value in settings.items() if isinstance(value, str)}


def model_digest(model: str) -> str | None:
    """Return the digest of a model's weights, code and tokenizer; None for a model on the Hub."""
    folder = model_folder(Path(model).expanduser())
    return _of([*_weights(folder), *_small(folder, MODEL)]) if folder.is_dir() else None


def model_commit(model: str) -> str | None:
    """Return the commit of a model on the Hub (offline, from the local cache); None for a folder or if unknown."""
    match = None if Path(model).expanduser().exists() else HUB_ID.fullmatch(model)
    return None if match is None else _commit(match["repository"], match["revision"])


@functools.cache
def _commit(repository: str, revision: str | None) -> str | None:
    found = Repository(repository, revision, "the model")
    try:
        found.fetch_if_there("config.json", or_in_cache=True)
    except CheckpointError:  # loading the model reports the reason
        return None
    return found.commit


def checkpoint_digest(checkpoint: str) -> str | None:
    """Return the digest of a checkpoint's weights (a folder, file, or index of shards); None for one on the Hub."""
    path = Path(checkpoint).expanduser()
    try:
        if not path.exists():
            return None
    except OSError:  # not a valid file name
        return None
    folder = path.parent if path.suffix == ".json" else path
    return _of(_weights(folder) if folder.is_dir() else [_weight(path)])


def adapter_digest(adapter: Path | None) -> str | None:
    """Return the digest of an adapter's weights, configuration and tokenizer; None without an adapter."""
    if adapter is None:
        return None
    weights = [adapter / name for name in ADAPTER_WEIGHTS if (adapter / name).is_file()][:1]  # PEFT loads the first
    found = [(file.name, digest(file)) for file in weights] + _small(adapter, ADAPTER)
    return _of(found) if found else None


def file_digest(path: str | None) -> str | None:
    """Return the digest of a file; None if `path` is None or the file does not exist."""
    file = None if path is None else Path(path).expanduser()
    return digest(file) if file is not None and file.is_file() else None


def files_digest(folder: Path | None, suffixes: Collection[str]) -> str | None:
    """Return the digest of all files with these suffixes in a folder and its subfolders; None without a folder."""
    if folder is None or not folder.is_dir():
        return None
    found = (file for file in folder.rglob("*") if file.suffix in suffixes and file.is_file())
    return _of((str(file.relative_to(folder)), digest(file)) for file in found)


def _weights(folder: Path) -> list[tuple[str, Any]]:
    kinds = ([file for file in folder.glob(kind) if file.is_file()] for kind in KINDS)
    return [_weight(file) for file in next(filter(None, kinds), [])]


def _weight(file: Path) -> tuple[str, Any]:
    return file.name, [file.stat().st_size, remembered(file, sampled)]


def _small(folder: Path, patterns: Iterable[str]) -> list[tuple[str, Any]]:
    named = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return [(str(file.relative_to(folder)), digest(file)) for file in named if file.name not in ADAPTER_WEIGHTS]


def _of(files: Iterable[tuple[str, Any]]) -> str:
    return text_digest(sorted(files))
