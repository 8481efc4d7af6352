"""Safetensors files of this package: tensors, and one JSON document in the metadata that describes them."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from safelora_fast.errors import CheckpointError, OutputError
from safelora_fast.files.json_reader import check_fields, check_regular, parse_json
from safelora_fast.files.output import whole_file

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True)
class TensorFile:
    """One format of file.

    Attributes:
        format: the document's key in the metadata.
        version: the document's "version".
        what: the name in messages, e.g. "persona vector".
        command: the command that writes such files.
    """

    format: str
    version: int
    what: str
    command: str

    def save(
        self, path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], document: Mapping[str, Any]
    ) -> None:
        """Write a file atomically. The same content gives the same bytes.

        Args:
            path: the file.
            tensors: written as float32.
            document: plain values; the version is added.

        Raises:
            OutputError: the file cannot be written.
        """
        # Use one metadata entry: the order in which safetensors writes several is not fixed.
        metadata = {self.format: json.dumps({"version": self.version, **document}, default=dict)}
        floats = {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}
        with whole_file(Path(path)) as partial:
            try:
                save_file(floats, partial, metadata=metadata)
            except SafetensorError as error:
                raise OutputError(f"{path}: the {self.what} cannot be written ({error}); nothing was kept") from error

    @contextmanager
    def opened(self, path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yield the document, and the open file, whose `get_tensor` returns its tensors.

        Raises:
            CheckpointError: the file is missing, damaged or of another format, or the block raised ValueError.
        """
        try:
            check_regular(path)
            with safe_open(path, framework="numpy") as file:
                document = check_fields(parse_json((file.metadata() or {}).get(self.format, "{}")), {})
                if document.get("version") != self.version:
                    raise CheckpointError(f"{path}: not a {self.what} file of version {self.version} ({self.command})")
                yield document, file
        except (OSError, SafetensorError, ValueError, TypeError) as error:  # TypeError: a dtype that numpy lacks
            raise CheckpointError(f"{path}: the {self.what} cannot be read ({error})") from error
