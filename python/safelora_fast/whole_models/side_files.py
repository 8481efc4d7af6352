"""Copy what lies beside the weights of a model: configuration, tokenizer, index, and other files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safelora_fast.checkpoints.hub import Repository
from safelora_fast.checkpoints.resolver import (
    CONFIG,
    INDEX,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    model_folder,
)
from safelora_fast.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safelora_fast.checkpoints.sources import Checkpoint

# Other forms of the weights, which would not be projected, and files that the output has of its own.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"}
OWN = {"README.md"}
ON_THE_HUB = (
    CONFIG,
    INDEX,
    TOKENIZER_CONFIG,
    *TOKENIZER_FILES,
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE"),
)


def side_files(model: Checkpoint) -> dict[str, Path]:
    """Return the files beside the weights of a model, by name. Other forms of the weights and hidden files stay behind.

    Raises:
        CheckpointError: a file cannot be downloaded, or is a link that leaves the folder: a tenant's model must not carry
            another file of this machine into the output. Links into the Hub's cache are its way of storing files.
    """
    if model.remote:
        repository = Repository(model.description, model.revision, "the fine-tuned model")
        found = {name: repository.fetch_if_there(name, or_in_cache=True) for name in ON_THE_HUB}
        return {name: path for name, path in found.items() if path is not None}
    folder = model_folder(Path(model.description))
    inside = [folder.resolve(), *([folder.parents[1].resolve() / "blobs"] if folder.parent.name == "snapshots" else [])]
    files = {}
    for path in sorted(folder.rglob("*")):
        beside = path.relative_to(folder)
        if path.suffix in WEIGHTS or str(beside) in OWN or any(part.startswith(".") for part in beside.parts):
            continue
        if path.is_file():
            if not any(path.resolve().is_relative_to(place) for place in inside):
                raise CheckpointError(f"{path}: is a link to a file outside the model's folder; replace it with a copy")
            files[str(beside)] = path
    return files


def copy_side_files(files: Mapping[str, Path], target: Path) -> None:
    """Copy files into a folder under their names.

    Raises:
        OSError: a file cannot be copied.
    """
    for name, path in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
