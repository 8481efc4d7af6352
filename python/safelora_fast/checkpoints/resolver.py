"""What the name of a model or an adapter stands for: a path on this machine, or a repository of the Hugging Face Hub.

All commands ask here, so they take the same names, and refuse the same mistakes with the same messages.
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
}  # whose adapters these are
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
        revision: what follows the @ of a Hub id, or None.
        commit: on the Hub; None for a folder.
        offline: use only the Hub's cache.
    """

    name: str
    revision: str | None = None
    commit: str | None = None
    offline: bool = False

    def arguments(self) -> dict[str, Any]:
        """Arguments for `from_pretrained`; all that they load is of one commit."""
        arguments: dict[str, Any] = {"pretrained_model_name_or_path": self.name}
        if self.commit is not None:
            arguments["revision"] = self.commit
        return {**arguments, "local_files_only": True} if self.offline else arguments

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def locate(source: str | Path, what: str) -> Path | Repository:
    """The path that exists, or else the repository. Nothing is fetched.

    Args:
        source: a path, or a Hub id with an optional `@revision`. A `Path` is never a Hub id.
        what: for messages, e.g. "the aligned model".

    Raises:
        CheckpointError: there is no such path, and it cannot be a Hub id.
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
    """The model that transformers loads for a folder, a file in it, or a Hub id. Of the Hub, only `config.json` is fetched.

    Raises:
        CheckpointError: there is no such model, it is an adapter, or the Hub is out of reach and the cache does not hold it.
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
    is_adapter = (folder / ADAPTER_CONFIG).exists()  # transformers would put it on the model by itself
    if is_adapter or not (folder / CONFIG).exists():
        raise CheckpointError(f"{folder}: {_no_model(is_adapter)}")
    return ModelSource(str(folder))


def _is_loaded(file: Path) -> bool:
    """Whether transformers loads this file of weights, or this index, from its folder."""
    if file.name != SINGLE and not (file.name == INDEX and not (file.parent / SINGLE).exists()):
        return False
    config = file.parent / CONFIG
    return not (config.exists() and b'"transformers_weights"' in config.read_bytes())


def name_and_revision(source: str | Path, what: str = "the model") -> tuple[str, str | None]:
    """The folder of a model and None, or its Hub id and the revision asked for. Nothing is fetched.

    Raises:
        CheckpointError: as :func:`locate`.
    """
    found = locate(source, what)
    return (found.name, found.revision) if isinstance(found, Repository) else (str(model_folder(found)), None)


def model_folder(path: Path) -> Path:
    """The folder of a model, given as a folder or as a file in it."""
    return path.parent if path.is_file() else path


def _no_model(is_adapter: bool) -> str:
    if is_adapter:
        return "this is a PEFT adapter, not a model; give the model that it was trained on"
    return f"holds no model: there is no {CONFIG}"


def adapter_folder(source: str | Path, *, tokenizer: bool = False) -> Path:
    """The folder of a PEFT adapter. From the Hub, configuration and weights are fetched into the cache.

    Args:
        source: the folder that PEFT's save_pretrained wrote, a file in it, or a Hub id with an optional `@revision`.
        tokenizer: fetch its tokenizer's files too, if it has any.

    Raises:
        AdapterError: there is none, or the Hub is out of reach and the cache does not hold it.
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
    """A folder as reports name it: Hub id and commit for one in the Hub's cache, else the path as given."""
    snapshots, repository = path.parent, path.parent.parent.name
    if snapshots.name != "snapshots" or not repository.startswith("models--"):
        return str(path)
    return f"{repository.removeprefix('models--').replace('--', '/')}@{path.name}"


def folder_name(path: Path) -> str:
    """An adapter's name: the last part of its folder or Hub id."""
    shown = label(path)
    return Path(os.path.realpath(path)).name if shown == str(path) else shown.partition("@")[0].rpartition("/")[2]


def named_adapter(word: str) -> tuple[str, Path]:
    """Name and folder of an adapter given as `NAME=ADAPTER`, or as a folder or Hub id, whose last part is its name.

    Raises:
        AdapterError: as :func:`adapter_folder`.
    """
    name, equals, rest = word.partition("=")
    if equals and not Path(word).expanduser().exists():
        return name, adapter_folder(rest)
    folder = adapter_folder(word)
    return folder_name(folder), folder


def did_you_mean(path: Path) -> str:
    """The end of a message about a path that does not exist: a path of a similar name that does, or nothing."""
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
