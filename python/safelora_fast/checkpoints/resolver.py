"""Resolve the name of a model or adapter to a path on this machine or a repository of the Hugging Face Hub.

All commands use this module, so they accept the same names and reject the same mistakes with the same messages.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelora_fast.checkpoints.hub import Repository
from safelora_fast.errors import AdapterError, CheckpointError
from safelora_fast.files.json_reader import readable

HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+|[\w.-]+)(@(?P<revision>[\w./-]+))?")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
OTHER_TOOLS = {
    "pytorch_lora_weights.safetensors": "diffusers",
    "adapters.safetensors": "MLX",
}  # file name: tool that writes it
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip


@dataclass(frozen=True)
class ModelSource:
    """Where transformers loads a model from.

    Attributes:
        name: a folder, or a Hub id.
        revision: the part of a Hub id after the @, or None.
        commit: the commit on the Hub; None for a folder.
        offline: whether to use only the Hub's cache.
    """

    name: str
    revision: str | None = None
    commit: str | None = None
    offline: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return arguments for `from_pretrained`. Everything loaded with them comes from one commit."""
        arguments: dict[str, Any] = {"pretrained_model_name_or_path": self.name}
        if self.commit is not None:
            arguments["revision"] = self.commit
        return {**arguments, "local_files_only": True} if self.offline else arguments

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def locate(source: str | Path, what: str) -> Path | Repository:
    """Return the path if it exists, otherwise the Hub repository. Nothing is downloaded.

    Args:
        source: a path, or a Hub id with an optional `@revision`. A `Path` is never a Hub id.
        what: the name in messages, e.g. "the aligned model".

    Raises:
        CheckpointError: the path does not exist, and the source cannot be a Hub id.
    """
    if not str(source) or "\0" in str(source):
        raise CheckpointError(f"{what} is {str(source)!r}; give its path or its Hub id")
    path = Path(source).expanduser()
    with readable(source, CheckpointError):
        if path.exists():
            return path
        if path.is_symlink():
            raise CheckpointError(f"{source}: {what} is a link that leads to nothing, or in a circle")
    match, hint = HUB_ID.fullmatch(str(source)), did_you_mean(path)
    if match is None or isinstance(source, Path):
        raise CheckpointError(f"{source}: {what} is neither a file, nor a folder, nor a Hub id{hint}")
    return Repository(match["repository"], match["revision"], what, hint)


def find_model(source: str | Path, what: str = "the model") -> ModelSource:
    """Return the model that transformers loads for a folder, a file in it, or a Hub id.

    From the Hub, only `config.json` is downloaded.

    Raises:
        CheckpointError: the model does not exist or is an adapter, or the Hub is unreachable and its cache lacks the
            model.
    """
    found = locate(source, what)
    if isinstance(found, Repository):
        if found.fetch_if_there(CONFIG) is None:
            is_adapter = found.fetch_if_there(ADAPTER_CONFIG, or_in_cache=True) is not None
            raise CheckpointError(f"{found.name}: {_no_model(is_adapter)}")
        return ModelSource(found.name, found.revision, found.commit, offline=not found.within_reach)
    with readable(found, CheckpointError):
        return _local_model(found, what)


def _local_model(found: Path, what: str) -> ModelSource:
    folder = model_folder(found)
    if found.is_file() and not _is_loaded(found):
        raise CheckpointError(f"{found}: is a file that transformers does not load; give {what}'s folder, {folder}")
    is_adapter = (folder / ADAPTER_CONFIG).exists()  # transformers would load it onto the model
    if is_adapter or not (folder / CONFIG).exists():
        raise CheckpointError(f"{folder}: {_no_model(is_adapter)}")
    return ModelSource(str(folder))


def _is_loaded(file: Path) -> bool:
    """Return whether transformers loads this weight file or index from its folder."""
    if file.name != SINGLE and not (file.name == INDEX and not (file.parent / SINGLE).exists()):
        return False
    config = file.parent / CONFIG
    return not (config.exists() and b'"transformers_weights"' in config.read_bytes())


def name_and_revision(source: str | Path, what: str = "the model") -> tuple[str, str | None]:
    """Return a model's folder and None, or its Hub id and the requested revision. Nothing is downloaded.

    Raises:
        CheckpointError: see :func:`locate`.
    """
    found = locate(source, what)
    return (found.name, found.revision) if isinstance(found, Repository) else (str(model_folder(found)), None)


def model_folder(path: Path) -> Path:
    """Return the folder of a model that is given as a folder or as a file in it."""
    return path.parent if path.is_file() else path


def _no_model(is_adapter: bool) -> str:
    if is_adapter:
        return "this is a PEFT adapter, not a model; give the model that it was trained on"
    return f"holds no model: there is no {CONFIG}"


def adapter_folder(source: str | Path, *, tokenizer: bool = False) -> Path:
    """Return the folder of a PEFT adapter. From the Hub, configuration and weights are downloaded into the cache.

    Args:
        source: the folder that PEFT's save_pretrained wrote, a file in it, or a Hub id with an optional `@revision`.
        tokenizer: whether to download the tokenizer's files too, if there are any.

    Raises:
        AdapterError: there is no adapter, or the Hub is unreachable and its cache lacks the adapter.
    """
    try:
        found = locate(source, "the adapter")
        with readable(source, AdapterError):
            return _fetched(found, tokenizer=tokenizer) if isinstance(found, Repository) else _checked(found)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error


def _checked(path: Path) -> Path:
    folder = path.parent if path.name in {ADAPTER_CONFIG, *ADAPTER_WEIGHTS} else path
    if not folder.is_dir():
        raise AdapterError(f"{folder}: is a file; give the adapter's folder, which holds {ADAPTER_CONFIG}")
    there = any((folder / name).exists() for name in ADAPTER_WEIGHTS)
    for name, tool in OTHER_TOOLS.items():
        if not there and (folder / name).exists():
            raise AdapterError(
                f"{folder}: holds {name}, an adapter in the format of {tool}; convert it to PEFT's first"
            )
    if not (folder / ADAPTER_CONFIG).is_file():
        inside = sorted(found.parent.name for found in folder.glob(f"*/{ADAPTER_CONFIG}"))
        hint = f"; the adapters in it are {', '.join(inside)}: give one of these folders" if inside else ""
        hint = "; it holds a model" if not hint and (folder / CONFIG).exists() else hint
        raise AdapterError(f"{folder}: holds no {ADAPTER_CONFIG}, so it is not a PEFT adapter{hint}")
    if not there:
        raise AdapterError(f"{folder}: holds no {ADAPTER_WEIGHTS[0]}")
    return folder


def _fetched(repository: Repository, *, tokenizer: bool) -> Path:
    config = repository.fetch_if_there(ADAPTER_CONFIG)
    if config is None:
        raise AdapterError(f"{repository.name}: the repository holds no {ADAPTER_CONFIG}, so it is not a PEFT adapter")
    if not any(repository.fetch_if_there(name) for name in ADAPTER_WEIGHTS):
        raise AdapterError(f"{repository.name}: the repository holds no {ADAPTER_WEIGHTS[0]}")
    if tokenizer and repository.fetch_if_there(TOKENIZER_CONFIG):
        for name in TOKENIZER_FILES:
            repository.fetch_if_there(name)
    return config.parent


def label(path: Path) -> str:
    """Return a folder's name for reports: Hub id and commit for a folder in the Hub's cache, else the path as given."""
    snapshots, repository = path.parent, path.parent.parent.name
    if snapshots.name != "snapshots" or not repository.startswith("models--"):
        return str(path)
    return f"{repository.removeprefix('models--').replace('--', '/')}@{path.name}"


def folder_name(path: Path) -> str:
    """Return an adapter's name: the last part of its folder or Hub id."""
    shown = label(path)
    return Path(os.path.realpath(path)).name if shown == str(path) else shown.partition("@")[0].rpartition("/")[2]


def named_adapter(word: str) -> tuple[str, Path]:
    """Return name and folder of an adapter given as `NAME=ADAPTER`, as a folder, or as a Hub id.

    Without NAME, the name is the last part of the folder or Hub id.

    Raises:
        AdapterError: see :func:`adapter_folder`.
    """
    name, equals, rest = word.partition("=")
    if equals and not Path(word).expanduser().exists():
        return name, adapter_folder(rest)
    folder = adapter_folder(word)
    return folder_name(folder), folder


def did_you_mean(path: Path) -> str:
    """Return the end of a message about a missing path: an existing path with a similar name, or ""."""
    for part in (path, *path.parents):
        try:
            names = [beside.name for beside in part.parent.iterdir()]
        except OSError:
            continue
        for name in difflib.get_close_matches(part.name, names, n=1):
            near = part.parent / name / path.relative_to(part)
            return f"; did you mean {near}?" if near.exists() else ""
        return ""
    return ""
