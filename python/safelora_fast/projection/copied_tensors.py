"""Tensors of an adapter that are not lora_A or lora_B: they are copied unchanged and bypass the projection."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from safelora_fast.checkpoints.adapter import EXCLUDED
from safelora_fast.checkpoints.adapter_keys import PREFIX
from safelora_fast.checkpoints.tensor_names import NameIndex, tower_of
from safelora_fast.errors import AdapterError, CheckpointError
from safelora_fast.printable import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from safelora_fast import _core
    from safelora_fast.checkpoints.adapter import Adapter
    from safelora_fast.checkpoints.sources import Checkpoint

FLOATS: dict[str, Any] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
PIECE = 1 << 21  # elements read at a time


def copied_tensors(adapter: Adapter, aligned: Checkpoint) -> list[dict[str, Any]]:
    """Return the report's entry for each copied tensor.

    - `tensor` and `reason`: its key, and why it is copied;
    - `not_finite`: the number of NaN and infinite values (0 for non-float dtypes); they are counted, not rejected;
    - `norm`: its Frobenius norm in float64, None for non-float dtypes;
    - `change`: the norm of its difference from the aligned model's tensor with the same name, None unless that tensor
      exists with the same shape;
    - `change_unknown`: the reason, if the aligned model's tensor could not be fetched from the Hub.
    """
    names = NameIndex(aligned.names)
    found = []
    for key, reason in adapter.copied:
        name = adapter.keys[key].removeprefix(PREFIX).replace(".base_layer.", ".")
        same = names.find(name, tower_of(adapter.config))
        values = _Values.of(adapter.file, key)
        entry: dict[str, Any] = {"tensor": key, "reason": reason, "not_finite": 0, "norm": None, "change": None}
        if values is not None:
            entry["not_finite"] = sum(int(np.count_nonzero(~np.isfinite(piece))) for piece in values)
            entry["norm"] = _norm(values)
            try:
                other = aligned.tensor(same[0]) if len(same) == 1 else None
            except CheckpointError as error:
                if not aligned.remote:
                    raise
                other, entry["change_unknown"] = None, str(error)
            if (
                other is not None
                and tuple(other.shape) == tuple(adapter.file.tensors[key][1])
                and other.dtype in FLOATS
            ):
                theirs = _Values(other.file.path, other.dtype, other.begin, other.end)
                entry["change"] = _norm(mine - other_piece for mine, other_piece in zip(values, theirs, strict=True))
        found.append(entry)
    return found


def bypassing(copied: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the copied tensors that change the model, except factors of modules that the user excluded.

    A tensor changes nothing if it equals the aligned model's tensor, or if it is zero and the aligned model has no such
    tensor. A tensor whose change is unknown is included.
    """
    return [
        item
        for item in copied
        if not str(item["reason"]).startswith(EXCLUDED)
        and item.get("change") != 0
        and (item.get("change") is not None or "change_unknown" in item or item.get("norm") != 0)
    ]


def bypass_note(copied: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a warning with the tensors that bypass the projection, and how far training changed each, if known."""
    going = bypassing(copied)
    if not going:
        return []
    more = f" and {len(going) - 4} more" if len(going) > 4 else ""
    return [
        f"{counted(len(going), 'tensor')} trained beside the LoRA factors (modules_to_save, biases, embeddings, norms) bypassed "
        f"the projection, unchanged: {', '.join(map(_in_words, going[:4]))}{more}; --strict refuses such adapters"
    ]


def refuse_bypassing(adapter: Adapter, copied: Sequence[Mapping[str, Any]]) -> None:
    """Reject an adapter with tensors that bypass the projection.

    Raises:
        AdapterError: the adapter has such tensors; the message names them.
    """
    for note in bypass_note(copied):
        raise AdapterError(
            f"{adapter.path}: {note.partition(';')[0]}, which strict refuses: train LoRA factors only, or do not use strict"
        )


def _in_words(item: Mapping[str, Any]) -> str:
    if item.get("change") is not None:
        return f"{item['tensor']} (‖W − W_aligned‖ {item['change']:.3g})"
    if item.get("change_unknown"):
        return f"{item['tensor']} (‖W − W_aligned‖ is not known: {item['change_unknown']})"
    return f"{item['tensor']} (norm {item['norm']:.3g})" if item.get("norm") is not None else str(item["tensor"])


class _Values:
    """Iterates over the values of a stored float tensor in pieces, converted to float64."""

    def __init__(self, path: str, dtype: str, begin: int, end: int) -> None:
        self._path, self._dtype, self._begin, self._size = path, dtype, begin, end - begin

    @classmethod
    def of(cls, file: _core.SafetensorsFile, key: str) -> _Values | None:
        """Return None for non-float dtypes."""
        dtype, _, begin, end = file.tensors[key]
        return cls(file.path, dtype, begin, end) if dtype in FLOATS else None

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        if not self._size:
            return
        stored = np.memmap(self._path, np.uint8, "r", self._begin, self._size).view(FLOATS[self._dtype])
        for start in range(0, len(stored), PIECE):
            piece = stored[start : start + PIECE]
            if self._dtype == "BF16":
                piece = (piece.astype(np.uint32) << 16).view(np.float32)
            yield piece.astype(np.float64)


def _norm(pieces: Iterable[np.ndarray[Any, Any]]) -> float:
    with np.errstate(all="ignore"):
        return math.sqrt(sum(float(np.square(piece).sum()) for piece in pieces))
