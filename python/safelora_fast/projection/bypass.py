"""The tensors of an adapter that are not LoRA factors: they are copied, so what training did to them is not projected."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from safelora_fast.checkpoints.adapter import EXCLUDED
from safelora_fast.checkpoints.adapter_keys import PREFIX
from safelora_fast.checkpoints.tensor_names import NameIndex, tower_of
from safelora_fast.errors import AdapterError, CheckpointError
from safelora_fast.printable import counted
from safelora_fast.projection.nonfinite_values import PIECE, count_not_finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from safelora_fast import _core
    from safelora_fast.checkpoints.adapter import Adapter
    from safelora_fast.checkpoints.sources import Checkpoint

FLOATS: dict[str, Any] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def copied_tensors(adapter: Adapter, aligned: Checkpoint) -> list[dict[str, Any]]:
    """What there is to say about each tensor that is copied.

    - `tensor` and `reason`: its key, and why it is no factor;
    - `not_finite`: how many of its values are NaN or infinite; nothing is computed from them;
    - `norm`: its Frobenius norm in float64, None for a dtype that is no float;
    - `change`: the norm of its difference from the aligned model's tensor of that name, None where there is none of its
      shape;
    - `change_unknown`: only where the file of a model on the Hub that holds the aligned model's tensor cannot be had: why.
    """
    names = NameIndex(aligned.names)
    found = []
    for key, reason in adapter.copied:
        entry: dict[str, Any] = {"tensor": key, "reason": reason, "not_finite": count_not_finite(adapter.file, key)}
        name = adapter.keys[key].removeprefix(PREFIX).replace(".base_layer.", ".")
        same = names.find(name, tower_of(adapter.config))
        try:
            found.append({**entry, **_norms(adapter.file, key, aligned, same)})
        except CheckpointError as error:
            if not aligned.remote:
                raise
            found.append({**entry, **_norms(adapter.file, key, aligned, []), "change_unknown": str(error)})
    return found


def bypassing(copied: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that change the model and are not LoRA factors that were excluded as asked.

    A tensor changes nothing where it equals the aligned model's, or where the aligned model has none and it is zero. One
    whose change is not known counts as changing it.
    """
    return [
        item
        for item in copied
        if not str(item["reason"]).startswith(EXCLUDED)
        and item.get("change") != 0
        and (item.get("change") is not None or "change_unknown" in item or item.get("norm") != 0)
    ]


def bypass_note(copied: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning that names the tensors that go around the projection, with how far training moved them where that is known."""
    going = bypassing(copied)
    if not going:
        return []
    more = f" and {len(going) - 4} more" if len(going) > 4 else ""
    return [
        f"{counted(len(going), 'tensor')} trained beside the LoRA factors (modules_to_save, biases, embeddings, norms) went around "
        f"the projection, unchanged: {', '.join(map(_in_words, going[:4]))}{more}; --strict refuses such adapters"
    ]


def refuse_bypassing(adapter: Adapter, copied: Sequence[Mapping[str, Any]]) -> None:
    """Refuse an adapter with tensors that go around the projection.

    Raises:
        AdapterError: it has some; they are named.
    """
    for note in bypass_note(copied):
        raise AdapterError(
            f"{adapter.path}: {note.partition(';')[0]}, which strict refuses: train factors only, or leave strict out"
        )


def _in_words(item: Mapping[str, Any]) -> str:
    if item.get("change") is not None:
        return f"{item['tensor']} (‖W − W_aligned‖ {item['change']:.3g})"
    if item.get("change_unknown"):
        return f"{item['tensor']} (‖W − W_aligned‖ is not known: {item['change_unknown']})"
    return f"{item['tensor']} (norm {item['norm']:.3g})" if item.get("norm") is not None else str(item["tensor"])


def _norms(file: _core.SafetensorsFile, key: str, aligned: Checkpoint, same: Sequence[str]) -> dict[str, float | None]:
    dtype, shape, begin, end = file.tensors[key]
    if dtype not in FLOATS:
        return {"norm": None, "change": None}
    other = aligned.tensor(same[0]) if len(same) == 1 else None
    if other is None or tuple(other.shape) != tuple(shape) or other.dtype not in FLOATS:
        return {"norm": _length(_values(file.path, dtype, begin, end)), "change": None}
    theirs = _values(other.file.path, other.dtype, other.begin, other.end)
    pieces = zip(_values(file.path, dtype, begin, end), theirs, strict=True)
    return {
        "norm": _length(_values(file.path, dtype, begin, end)),
        "change": _length(ours - aligned_values for ours, aligned_values in pieces),
    }


def _length(pieces: Iterator[np.ndarray[Any, Any]]) -> float:
    with np.errstate(all="ignore"):
        return math.sqrt(sum(float(np.square(piece).sum()) for piece in pieces))


def _values(path: str, dtype: str, begin: int, end: int) -> Iterator[np.ndarray[Any, Any]]:
    """The values of a tensor in float64, some at a time: as many in each piece whatever the dtype."""
    if begin == end:
        return
    stored = np.memmap(path, np.uint8, "r", begin, end - begin).view(FLOATS[dtype])
    for start in range(0, len(stored), PIECE // 8):
        piece = stored[start : start + PIECE // 8]
        if dtype == "BF16":
            piece = (piece.astype(np.uint32) << 16).view(np.float32)
        yield piece.astype(np.float64)
