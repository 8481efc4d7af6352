"""Open the tensors of a checkpoint: a safetensors file, a sharded index, a folder, or a repository on the Hub.

An index or a header lists the names of all tensors. A shard is opened, and downloaded from the Hub, when
:meth:`Checkpoint.require` needs tensors in it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

from safelora_fast import _core
from safelora_fast.checkpoints.resolver import INDEX, SINGLE, locate
from safelora_fast.errors import CheckpointError
from safelora_fast.files.argument_checks import check_path
from safelora_fast.files.json_reader import OBJECT, TEXT, check_fields, of_kind, read_json, readable, why

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from safelora_fast.checkpoints.hub import Repository

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".gguf"}
NOT_THE_MODEL = ("adapter_model", "consolidated")  # an adapter, and Mistral's second copy of the weights
A_MODEL = "the path of a model or its Hub id"
CONVERT = "load it with transformers and call save_pretrained(..., safe_serialization=True)"
Config: TypeAlias = "Mapping[str, Any] | None"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: its file, its dtype as safetensors spells it, its shape, and its byte range in the file."""

    file: _core.SafetensorsFile
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass
class Checkpoint:
    """The tensors of one model.

    Attributes:
        description: the path or Hub id as given.
        revision: the commit on the Hub, or None.
        config: the content of config.json, or None if the file does not exist.
        remote: whether the checkpoint comes from the Hub.
        beside: a warning about other content of the folder, or None.
    """

    description: str
    revision: str | None
    config: Config
    _shards: Mapping[str, str]
    _locate: Callable[[str], Path]
    _opened: dict[str, tuple[_core.SafetensorsFile, Mapping[str, tuple[str, tuple[int, ...], int, int]]]] = field(
        default_factory=dict
    )
    remote: bool = False
    beside: str | None = None

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors, known before any shard is downloaded."""
        return self._shards.keys()

    def __contains__(self, name: str) -> bool:
        """Return whether the checkpoint has a tensor of this name."""
        return name in self._shards

    def require(self, names: Iterable[str]) -> None:
        """Open the shards that hold these tensors, and download them if necessary."""
        for shard in sorted({self._shards[name] for name in names} - self._opened.keys()):
            self.add(shard, _core.SafetensorsFile(str(self._locate(shard))))

    def add(self, shard: str, file: _core.SafetensorsFile) -> None:
        """Register a shard that is already open."""
        self._opened[shard] = file, file.tensors

    def tensor(self, name: str) -> TensorEntry:
        """Return the entry of a tensor, and open its shard if necessary.

        Raises:
            CheckpointError: the shard lacks a tensor that the index lists.
        """
        self.require([name])
        file, tensors = self._opened[self._shards[name]]
        if name not in tensors:
            raise CheckpointError(f"{file.path}: the index promises tensor {name!r}, but the file does not hold it")
        return TensorEntry(file, *tensors[name])

    @property
    def quantization(self) -> str | None:
        """The quantization method in config.json, or None. The dtypes decide whether the weights are quantized."""
        declared = (self.config or {}).get("quantization_config")
        if not declared:
            return None
        return str(declared.get("quant_method", "unnamed")) if isinstance(declared, dict) else "unnamed"

    @property
    def warnings(self) -> list[str]:
        """Warnings about a checkpoint whose weights have been read."""
        found = [] if self.beside is None else [self.beside]
        if (method := self.quantization) is not None:
            found.append(
                f"{self.description}: config.json holds a quantization_config ({method}), but the weights that were read are not "
                "quantized, and are used as they are"
            )
        return found

    @property
    def files(self) -> list[_core.SafetensorsFile]:
        """The shards opened so far."""
        return [file for file, _ in self._opened.values()]


def open_checkpoint(source: str | Path, *, role: str) -> Checkpoint:
    """Open a checkpoint by path or Hub id. An existing path wins.

    Args:
        source: a safetensors file, an index, a folder, or a Hub id with an optional `@revision`.
        role: "aligned" or "base", for messages.

    Raises:
        CheckpointError: the checkpoint does not exist or cannot be streamed.
        SettingsError: the source is neither text nor a path.
    """
    check_path(role, source, A_MODEL)
    with readable(source, CheckpointError):
        found = locate(source, f"the {role} model")
        if not isinstance(found, Path):
            return _from_hub(found)
        return _from_folder(found) if found.is_dir() else _from_file(found)


def same_place(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether two checkpoints are the same folder, file or commit on the Hub."""
    if one.remote or other.remote:
        return (one.description, one.revision) == (other.description, other.revision) and one.revision is not None
    return os.path.realpath(one.description) == os.path.realpath(other.description)


def _from_folder(folder: Path) -> Checkpoint:
    config = _config(folder / "config.json")
    chosen = _weights_file(config, lambda name: folder / name if (folder / name).exists() else None, str(folder))
    adapter = (folder / "adapter_config.json").exists()
    if adapter and (chosen is None or config is None):
        raise CheckpointError(f"{folder}: this is a PEFT adapter, not a model; give the model that it was trained on")
    if chosen is None:
        return _from_loose_files(folder, config)
    checkpoint = _from_file(chosen)
    checkpoint.description = str(folder)
    if adapter:
        checkpoint.beside = (
            f"{folder}: holds an adapter (adapter_config.json) beside the model, which transformers loads on top of it; "
            f"read here is {chosen.name} alone"
        )
    return checkpoint


def _weights_file(config: Config, there: Callable[[str], Path | None], where: str) -> Path | None:
    """Return the file or index that transformers loads: the one in config.json, else the single file, else an index."""
    named = (config or {}).get("transformers_weights")
    if named is None:
        return there(SINGLE) or there(INDEX)
    readable_here = isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))
    if not readable_here or "/" in named or _outside(named):
        raise CheckpointError(
            f"{where}: config.json names {named!r} as transformers_weights, which is not a safetensors file or index "
            "beside it"
        )
    if (found := there(named)) is None:
        raise CheckpointError(f"{where}: config.json names {named} as transformers_weights, but there is no such file")
    return found


def _outside(name: str) -> bool:
    """Return whether a file name leads out of its folder."""
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name


def _from_loose_files(folder: Path, config: Config) -> Checkpoint:
    """Open files whose names transformers does not look for, if the folder cannot be read in another way."""
    if loaded := next((name for name in PICKLES if (folder / name).exists()), None):
        raise CheckpointError(f"{folder}: its model is {loaded}, which is not safetensors; to convert it, {CONVERT}")
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _from_file(indices[0])
    found = sorted(folder.glob("*.safetensors"))
    files = [file for file in found if not file.name.startswith(NOT_THE_MODEL)] or found
    if not files:
        if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES):
            raise CheckpointError(f"{folder}: holds {pickles[0]} but no safetensors file; to convert it, {CONVERT}")
        inside = sorted({path.parent.name for name in (SINGLE, INDEX) for path in folder.glob(f"*/{name}")})
        hint = f"; there is a model in {', '.join(inside)}: give that folder" if inside else ""
        raise CheckpointError(f"{folder}: holds no safetensors file and no index{hint}")
    opened = {file.name: _core.SafetensorsFile(str(file)) for file in files}
    shards: dict[str, str] = {}
    for shard, file in opened.items():
        for name in file.tensors:
            if (other := shards.setdefault(name, shard)) != shard:
                raise CheckpointError(
                    f"{folder}: tensor {name!r} is in {other} and in {shard}, and there is no index to choose"
                )
    checkpoint = Checkpoint(str(folder), None, config, shards, lambda shard: folder / shard)
    for shard, file in opened.items():
        checkpoint.add(shard, file)
    return checkpoint


def _from_file(path: Path) -> Checkpoint:
    folder, config = path.parent, _config(path.parent / "config.json")
    whole = path.name == SINGLE or (path.name == INDEX and not (folder / SINGLE).exists())
    description = str(folder if whole else path)
    if path.name.endswith(".index.json"):
        return Checkpoint(description, None, config, _core.read_index(str(path)), Path)
    if path.suffix == ".json":
        raise CheckpointError(
            f"{path}: is neither a safetensors file nor an index of such files (*.safetensors.index.json); give the "
            f"model's folder, {folder}"
        )
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(f"{path}: only safetensors can be streamed; to convert it, {CONVERT}")
    file = _core.SafetensorsFile(str(path))
    checkpoint = Checkpoint(description, None, config, dict.fromkeys(file.tensors, path.name), lambda _: path)
    checkpoint.add(path.name, file)
    return checkpoint


def _from_hub(repository: Repository) -> Checkpoint:
    config = repository.fetch_if_there("config.json", or_in_cache=True)
    content = _config(config) if config else None
    if repository.fetch_if_there("adapter_config.json", or_in_cache=True):
        raise CheckpointError(
            f"{repository.name}: holds an adapter_config.json, so transformers loads the model that it names instead of "
            "what else lies there; give that model"
        )
    chosen = _weights_file(
        content, lambda name: repository.fetch_if_there(name, or_in_cache=name == SINGLE), repository.name
    )
    if chosen is None:
        raise CheckpointError(
            f"{repository.name}: holds neither {INDEX} nor {SINGLE}; older .bin checkpoints: {CONVERT}"
        )
    if chosen.suffix == ".json":
        shards = _shard_names(chosen)
    else:
        shards = dict.fromkeys(_core.SafetensorsFile(str(chosen)).tensors, chosen.name)
    return Checkpoint(repository.name, repository.commit, content, shards, repository.fetch, remote=True)


def _shard_names(index: Path) -> dict[str, str]:
    """Return the `weight_map` of an index whose shards have not been downloaded yet."""
    try:
        weight_map = check_fields(read_json(index), {"weight_map": OBJECT})["weight_map"]
        names = {name: of_kind(shard, TEXT, f"the file of {name}") for name, shard in weight_map.items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: this is not an index of safetensors shards: {why(error)}") from error
    for name, shard in names.items():
        if _outside(shard):
            raise CheckpointError(f"{index}: tensor {name!r} lies in {shard!r}, outside the repository")
    return names


def _config(path: Path) -> Config:
    try:
        config = check_fields(read_json(path), {}, {"model_type": TEXT, "text_config": OBJECT})
        check_fields(config.get("text_config") or {}, {}, {"model_type": TEXT})
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {why(error)}") from error
    return config
