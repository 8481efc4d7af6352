"""The dense float64 oracle for the extension, and helpers that write test files."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from safelora_fast import _core
from safelora_fast.projection.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

Array = npt.NDArray[np.float64]
SIZES = {"F32": 4, "BF16": 2, "F16": 2}


def encode(values: npt.ArrayLike, dtype: str) -> bytes:
    """Round values to a stored dtype (nearest, ties to even) and return their little-endian bytes."""
    single = np.ascontiguousarray(values, dtype=np.float64).astype(np.float32)
    if dtype == "F32":
        return single.tobytes()
    if dtype == "F16":
        return single.astype(np.float16).tobytes()
    bits = single.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def decode(data: bytes, dtype: str, shape: tuple[int, ...]) -> Array:
    """Return the values of little-endian bytes of a stored dtype."""
    if dtype == "BF16":
        bits = np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64).reshape(shape)
    return np.frombuffer(data, dtype={"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float64).reshape(shape)


def rounded(values: npt.ArrayLike, dtype: str) -> Array:
    """Return values rounded to a stored dtype."""
    return decode(encode(values, dtype), dtype, np.shape(values))


def write(path: Path, tensors: dict[str, tuple[str, Array]], padding: int = 0) -> _core.SafetensorsFile:
    """Write a safetensors file; `padding` spaces in its header make tensors unaligned."""
    entries: dict[str, Any] = {}
    data = b""
    for name, (dtype, values) in tensors.items():
        content = encode(values, dtype)
        entries[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    header = json.dumps(entries).encode() + b" " * padding
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return _core.SafetensorsFile(str(path))


def whole(file: _core.SafetensorsFile, name: str) -> _core.View:
    """Return the view of a whole two-dimensional tensor."""
    rows, cols = file.tensors[name][1]
    return _core.View(file, name, rows=rows, cols=cols, row_stride=cols)


@dataclass
class Truth:
    """Results of the paper's formulas in float64, from dense C and dW."""

    projected: Array
    cosine: float
    gain: float
    lora_b_norm: float
    update_norm: float
    update_norm_projected: float


def paper_operator(v: Array) -> Array:
    """C = V V^T / ||V||_F."""
    return v @ v.T / np.linalg.norm(v)


def truth(v: Array, lora_b: Array, lora_a: Array, operator: Array | None = None, on_a: Array | None = None) -> Truth:
    """Metrics of one adapter: `operator` (default: C) acts on B, `on_a` on A; the cosine is always that of C."""
    paper = paper_operator(v)
    operator = paper if operator is None else operator
    update = lora_b @ lora_a
    image = paper @ update
    projected = operator @ lora_b
    return Truth(
        projected=projected,
        cosine=float((image * update).sum() / (np.linalg.norm(image) * np.linalg.norm(update))),
        gain=float(np.linalg.norm(projected) / np.linalg.norm(lora_b)),
        lora_b_norm=float(np.linalg.norm(lora_b)),
        update_norm=float(np.linalg.norm(update)),
        update_norm_projected=float(np.linalg.norm(projected @ (lora_a if on_a is None else lora_a @ on_a))),
    )


def lora(file: _core.SafetensorsFile) -> _core.Factors:
    """Return the LoRA factors in a file."""
    return _core.Factors(whole(file, "B"), whole(file, "A"))


def start(jobs: list[_core.Job], **options: Any) -> _core.ProjectionStream:
    """Start a stream of jobs; options are settings of a projection and arguments of the stream."""
    names = ("operator", "normalize", "rank", "energy", "keep", "sides")
    settings = Settings(**{name: options.pop(name) for name in names if name in options})
    return _core.ProjectionStream(jobs, settings.described_operator.in_rust(vars(settings)), **options)


@dataclass
class Module:
    """A module on disk, and its stored values."""

    job: _core.Job
    parts: list[_core.Part]
    v: Array
    adapters: list[tuple[Array, Array]]
    dtype: str

    def run(self, **options: Any) -> _core.JobOutcome:
        """Return the outcome of this module alone."""
        stream = start([self.job], **options)
        outcomes = list(stream)
        stream.close()
        assert [outcome.index for outcome in outcomes] == [0]
        return outcomes[0]

    def projected(self, outcome: _core.JobOutcome, adapter: int = 0) -> Array:
        """Return the projected lora_B of an outcome."""
        return decode(outcome.factors[adapter].projected(), self.dtype, self.adapters[adapter][0].shape)


def module(
    folder: Path,
    rng: np.random.Generator,
    *,
    shape: tuple[int, int] = (70, 130),
    ranks: tuple[int, ...] = (5,),
    weight_dtypes: tuple[str, str] = ("F32", "F32"),
    dtype: str = "F32",
    transposed: bool = False,
    parts: tuple[int, ...] | None = None,
    v: Array | None = None,
    name: str = "layer",
    padding: int = 0,
) -> Module:
    """Write a random module to disk; `parts` are the row counts of its stored parts."""
    m, n = shape
    folder.mkdir(exist_ok=True)
    base = rng.standard_normal((m, n))
    aligned = base + (0.05 * rng.standard_normal((m, n)) if v is None else v)
    aligned, base = rounded(aligned, weight_dtypes[0]), rounded(base if v is None else aligned - v, weight_dtypes[1])
    stored = [aligned.T, base.T] if transposed else [aligned, base]
    rows = parts or (len(stored[0]),)
    edges = np.cumsum((0, *rows))
    files = []
    for side, values, kind in zip(("aligned", "base"), stored, weight_dtypes, strict=True):
        blocks = {f"part{i}": (kind, values[edge : edges[i + 1]]) for i, edge in enumerate(edges[:-1])}
        files.append(write(folder / f"{side}.safetensors", blocks, padding))
    adapters, factors = [], []
    for index, rank in enumerate(ranks):
        lora_b = rounded(rng.standard_normal((m, rank)), dtype)
        lora_a = rounded(rng.standard_normal((rank, n)) / np.sqrt(n), dtype)
        file = write(folder / f"adapter{index}.safetensors", {"B": (dtype, lora_b), "A": (dtype, lora_a)}, padding)
        adapters.append((lora_b, lora_a))
        factors.append(lora(file))
    pairs = [_core.Part(whole(files[0], f"part{i}"), whole(files[1], f"part{i}")) for i in range(len(rows))]
    # The kernels form V in float32.
    difference = (aligned.astype(np.float32) - base.astype(np.float32)).astype(np.float64)
    return Module(_core.Job(name, pairs, factors, transposed=transposed), pairs, difference, adapters, dtype)
