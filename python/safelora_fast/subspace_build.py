"""Building a safe subspace: randomised subspace iteration on V = aligned − base, streamed module by module."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from safelora_fast._core import Factors, Job, Part, ProjectionStream, SafetensorsFile, View, read_index
from safelora_fast.errors import CheckpointError, PairingError, SettingsError
from safelora_fast.subspace import ModuleSubspace, SafeSubspace

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OVERSAMPLING = 8
FIRST_ENERGY_RANK = 32
MAX_ITERATIONS = 16
CONVERGED = 1e-6


def build_subspace(
    aligned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    modules: Sequence[str] = PROJECTIONS,
    rank: int | None = None,
    energy: float | None = None,
    fan_in_fan_out: bool = False,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[str, ModuleSubspace], None] | None = None,
) -> SafeSubspace:
    """Stream two checkpoints and keep U_k, σ_k and ‖V‖_F of each module; see :meth:`SafeSubspace.build`."""
    if rank is None and energy is None:
        rank = 64
    if rank is not None and energy is not None:
        raise SettingsError("rank and energy exclude each other")
    if rank is not None and rank < 1:
        raise SettingsError(f"rank is {rank}, it must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise SettingsError(f"energy is {energy}, it must be above 0 and at most 1")
    aligned_tensors, base_tensors = open_checkpoint(aligned), open_checkpoint(base)
    built: dict[str, ModuleSubspace] = {}
    for name, part in _pairs(aligned_tensors, base_tensors, tuple(modules)):
        matrix = _Difference(name, part[0], part[1], transposed=fan_in_fan_out, threads=threads)
        built[name] = leading_subspace(matrix, rank=rank, energy=energy, seed=seed)
        if progress is not None:
            progress(name, built[name])
    if not built:
        raise PairingError(f"{aligned}: no module ends in {', '.join(modules)}")
    return SafeSubspace(
        built,
        {"aligned": describe_source(aligned, aligned_tensors), "base": describe_source(base, base_tensors)},
    )


def leading_subspace(
    matrix: Any, *, rank: int | None = None, energy: float | None = None, seed: int = 0
) -> ModuleSubspace:
    """Leading left singular vectors of V, by rank or by the share of ‖V‖²_F that they hold.

    Subspace iteration: Y = V(VᵀQ), orthonormalised, until the singular values of the kept rank stand still.

    Args:
        matrix: has `shape` (m, n), `norm` ‖V‖_F, and `gram_product(Q)` giving V·Vᵀ·Q in float64.
        rank: how many vectors; fewer where V has a lower rank.
        energy: share of ‖V‖²_F; the fewest vectors that hold it.
        seed: of the random start.
    """
    rows, columns = matrix.shape
    limit = min(rows, columns)
    wanted = min(rank or FIRST_ENERGY_RANK, limit)
    basis = np.zeros((rows, 0))
    while True:
        width = min(wanted + OVERSAMPLING, limit)
        vectors, values = _iterate(matrix, basis, width, wanted, seed)
        if energy is None or wanted == limit:
            break
        held = np.cumsum(values[:wanted] ** 2)
        if held[-1] >= energy * matrix.norm**2:
            break
        basis, wanted = vectors, min(2 * wanted, limit)
    if energy is not None:
        held = np.cumsum(values[:wanted] ** 2)
        wanted = min(int(np.searchsorted(held, energy * matrix.norm**2 * (1 - 1e-12))) + 1, wanted)
    kept = int(np.count_nonzero(values[:wanted] > 1e-6 * values[0])) if values[0] > 0 else 0
    return ModuleSubspace(
        left_vectors=np.ascontiguousarray(vectors[:, :kept], dtype=np.float32),
        singular_values=values[:kept].astype(np.float32),
        v_norm=matrix.norm,
        columns=columns,
    )


def _iterate(matrix: Any, basis: np.ndarray, width: int, wanted: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    start = random.standard_normal((matrix.shape[0], width - basis.shape[1]))
    vectors = np.linalg.qr(np.concatenate([basis, start], axis=1))[0]
    former = np.full(wanted, np.inf)
    for _ in range(MAX_ITERATIONS):
        image = matrix.gram_product(vectors)
        squares, mixing = np.linalg.eigh(vectors.T @ image)
        order = np.argsort(squares)[::-1]
        values = np.sqrt(np.clip(squares[order], 0, None))
        ritz = vectors @ mixing[:, order]
        if np.all(np.abs(values[:wanted] - former) <= CONVERGED * max(values[0], np.finfo(float).tiny)):
            break
        former = values[:wanted]
        vectors = np.linalg.qr(image @ mixing[:, order])[0]
    return ritz, values


class _Difference:
    """V of one module on disk, multiplied by the kernel of the projection command."""

    def __init__(
        self, name: str, aligned: SafetensorsFile, base: SafetensorsFile, *, transposed: bool, threads: int | None
    ) -> None:
        self.name = name
        self._transposed = transposed
        self._threads = threads
        tensor = name + ".weight"
        stored = aligned.tensors[tensor][1]
        if stored != base.tensors[tensor][1]:
            raise PairingError(f"module {name} is {stored} in {aligned.path}, {base.tensors[tensor][1]} in {base.path}")
        view = {"rows": stored[0], "cols": stored[1], "row_stride": stored[1]}
        self._part = Part(View(aligned, tensor, **view), View(base, tensor, **view))
        self.shape = (stored[1], stored[0]) if transposed else (stored[0], stored[1])
        self.norm = 0.0
        self.gram_product(np.ones((self.shape[0], 1)))

    def gram_product(self, vectors: np.ndarray) -> np.ndarray:
        """V·Vᵀ·vectors [m, r], computed with float32 products."""
        rows, columns = self.shape
        count = vectors.shape[1]
        with tempfile.TemporaryDirectory(prefix="safelora-fast-") as folder:
            path = str(Path(folder) / "vectors.safetensors")
            left = np.ascontiguousarray(vectors, dtype=np.float32)
            save_file({"left": left, "right": np.zeros((count, columns), np.float32)}, path)
            file = SafetensorsFile(path)
            factors = Factors(
                View(file, "left", rows=rows, cols=count, row_stride=count),
                View(file, "right", rows=count, cols=columns, row_stride=columns),
            )
            job = Job(self.name, [self._part], [factors], transposed=self._transposed)
            stream = ProjectionStream([job], operator="safelora", threads=self._threads)
            try:
                outcome = next(stream)
            finally:
                stream.close()
        self.norm = outcome.v_norm
        if self.norm == 0:
            return np.zeros_like(vectors)
        projected = np.frombuffer(outcome.factors[0].projected(), dtype=np.float32).reshape(rows, count)
        return projected.astype(np.float64) * self.norm


def open_checkpoint(source: str | os.PathLike[str]) -> dict[str, SafetensorsFile]:
    """Tensor name -> the open file that holds it, of a safetensors file or a folder with one or with an index.

    Raises:
        CheckpointError: there is no such file or folder, or it holds no safetensors checkpoint.
    """
    path = Path(source)
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.is_file():
            places = read_index(str(index))
            files = {place: SafetensorsFile(place) for place in sorted(set(places.values()))}
            return {name: files[place] for name, place in places.items()}
        path = path / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{source}: no safetensors file, and no folder with model.safetensors or its index")
    file = SafetensorsFile(str(path))
    return dict.fromkeys(file.tensors, file)


def describe_source(source: str | os.PathLike[str], tensors: Mapping[str, SafetensorsFile]) -> dict[str, Any]:
    """Path, and for each file its size and the hash of its header, which lists every tensor with dtype and place."""
    files = {}
    for file in sorted({file.path: file for file in tensors.values()}.values(), key=lambda file: file.path):
        with Path(file.path).open("rb") as stream:
            header = hashlib.sha256(stream.read(file.data_start)).hexdigest()
        files[Path(file.path).name] = {"size": file.size, "header_sha256": header}
    return {"path": str(Path(source).resolve()), "files": files}


def _pairs(
    aligned: Mapping[str, SafetensorsFile], base: Mapping[str, SafetensorsFile], modules: tuple[str, ...]
) -> Iterator[tuple[str, tuple[SafetensorsFile, SafetensorsFile]]]:
    for tensor in aligned:
        name = tensor.removesuffix(".weight")
        if name == tensor or name.rsplit(".", 1)[-1] not in modules:
            continue
        if tensor not in base:
            ending = name.rsplit(".", 1)[-1]
            near = [other for other in base if other.removesuffix(".weight").endswith(ending)][:3]
            raise PairingError(f"module {name} is not in the base checkpoint; nearest: {', '.join(near) or 'none'}")
        yield name, (aligned[tensor], base[tensor])
