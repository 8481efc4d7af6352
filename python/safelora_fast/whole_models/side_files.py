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

if TYPE_CHECKING:
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


def copy_side_files(model: Checkpoint, target: Path) -> None:
    """Copy the files beside the weights of a model. Other forms of the weights and hidden files stay behind.

    Raises:
        OSError: a file cannot be copied.
        CheckpointError: a file cannot be downloaded.
    """
    if model.remote:
        repository = Repository(model.description, model.revision, "the fine-tuned model")
        for name in ON_THE_HUB:
            if (path := repository.fetch_if_there(name, or_in_cache=True)) is not None:
                shutil.copyfile(path, target / name)
        return
    folder = model_folder(Path(model.description))
    for path in sorted(folder.rglob("*")):
        beside = path.relative_to(folder)
        if path.suffix in WEIGHTS or str(beside) in OWN or any(part.startswith(".") for part in beside.parts):
            continue
        if path.is_file():
            (target / beside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / beside)
