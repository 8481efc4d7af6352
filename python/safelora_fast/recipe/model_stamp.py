"""The stamp of a model on disk: digests of everything that its answers depend on, to which stored results are tied.

These are the model's folder, the adapter with its configuration, the tokenizers of both and the chat template's file, wherever
they are. Small files and an adapter's weights are read whole. Of a model's weights, which may have hundreds of gigabytes, only
the samples are read that a subspace's provenance uses: training changes nearly every weight, so a few milliseconds suffice to
notice it. A model of the Hub is known by its commit. :func:`~safelora_fast.models.digests.weights_digest` is for loaded models.
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
KINDS = ("*.safetensors", "*.bin")  # of weights; transformers takes the first that there is
CHECKPOINTS = (".aligned", ".base")  # settings that may name one of the Hub


def subject_stamp(model: str, adapter: Path | None = None, chat_template: str | None = None) -> dict[str, str | None]:
    """Digests of a model on disk or on the Hub, of the adapter on it, and of a chat template's file.

    Args:
        model: a folder, or a Hub id with an optional `@revision`.
        adapter: its folder.
        chat_template: a Jinja file in the place of the tokenizer's own template.

    Returns:
        `model_sha256`, `model_commit` (one of the two is None), `adapter_sha256`, `chat_template_sha256`; None where there is
        no such thing.

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
    """Digests of what a training reads besides its data: the model, the template, and the files and checkpoints of defenses.

    Returns:
        `model`, see :func:`subject_stamp`, and for every setting that names a file or a checkpoint its digest or commit.

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
    """What may name a file or a checkpoint: the texts among the settings of defenses, monitors and margin, by their keys."""
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
    """Of a model's weights, its code, and all that makes its tokens; None for a model of the Hub."""
    folder = model_folder(Path(model).expanduser())
    return _of([*_weights(folder), *_small(folder, MODEL)]) if folder.is_dir() else None


def model_commit(model: str) -> str | None:
    """The commit of a model of the Hub, by the Hub or, out of its reach, by the cache; None for a folder, or if neither knows."""
    match = None if Path(model).expanduser().exists() else HUB_ID.fullmatch(model)
    return None if match is None else _commit(match["repository"], match["revision"])


@functools.cache
def _commit(repository: str, revision: str | None) -> str | None:
    found = Repository(repository, revision, "the model")
    try:
        found.fetch_if_there("config.json", or_in_cache=True)
    except CheckpointError:  # whoever loads the model says why
        return None
    return found.commit


def checkpoint_digest(checkpoint: str) -> str | None:
    """Of the weights of a checkpoint: a folder, a file, or the index of several; None for one of the Hub."""
    path = Path(checkpoint).expanduser()
    try:
        if not path.exists():
            return None
    except OSError:  # no name of a file
        return None
    folder = path.parent if path.suffix == ".json" else path
    return _of(_weights(folder) if folder.is_dir() else [_weight(path)])


def adapter_digest(adapter: Path | None) -> str | None:
    """Of an adapter's weights, how they are put on the model, and its tokenizer; None where there is none."""
    if adapter is None:
        return None
    weights = [adapter / name for name in ADAPTER_WEIGHTS if (adapter / name).is_file()][:1]  # PEFT takes the first
    found = [(file.name, digest(file)) for file in weights] + _small(adapter, ADAPTER)
    return _of(found) if found else None


def file_digest(path: str | None) -> str | None:
    """Of one file; None where none is named, or there is none."""
    file = None if path is None else Path(path).expanduser()
    return digest(file) if file is not None and file.is_file() else None


def files_digest(folder: Path | None, suffixes: Collection[str]) -> str | None:
    """Of the files of some kinds in a folder and below; None where there is no folder."""
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
