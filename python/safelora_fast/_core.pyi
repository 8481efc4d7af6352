"""Types of the Rust extension module. Python decides what to compute; this module reads the bytes and computes it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, final

__all__ = [
    "Cuda",
    "CudaPlan",
    "FactorOutcome",
    "Factors",
    "Job",
    "JobOutcome",
    "Operator",
    "Part",
    "ProjectionStream",
    "SafetensorsFile",
    "UpdateOutcome",
    "View",
    "__version__",
    "copy_views",
    "cpu_features",
    "cuda_kernels",
    "default_threads",
    "feature_distance",
    "feature_distance_gradient",
    "fma_peak",
    "kernel_level",
    "project_update",
    "read_index",
    "read_seconds",
    "subspace_projection",
    "update_seconds",
]

__version__: str

@final
class SafetensorsFile:
    """A memory-mapped safetensors file whose header has been checked against the file.

    Raises `safelora_fast.errors.CheckpointError` if the file is missing or truncated, or its header does not match it.
    """

    def __new__(cls, path: str) -> SafetensorsFile: ...
    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int:
        """Length of the file in bytes."""
    @property
    def data_start(self) -> int:
        """Offset of the first tensor byte in the file (8 + header length)."""
    @property
    def metadata(self) -> dict[str, str]:
        """The header's `__metadata__`, empty when there is none."""
    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        """Map name to (dtype in safetensors spelling, shape, begin, end); begin and end are offsets in the file."""
    def read(self, name: str) -> bytes:
        """Return the bytes of one tensor (a copy)."""

def read_index(path: str) -> dict[str, str]:
    """Read `weight_map` of a `*.safetensors.index.json`: tensor name -> absolute path of its shard.

    Raises `CheckpointError` if an entry leaves the index's folder or its file does not exist.
    """

@final
class View:
    """A strided matrix inside a tensor of a file; offsets and strides in elements. The constructor checks bounds."""

    def __new__(
        cls,
        file: SafetensorsFile,
        tensor: str,
        *,
        offset: int = 0,
        rows: int,
        cols: int,
        row_stride: int,
        col_stride: int = 1,
    ) -> View: ...
    @property
    def nbytes(self) -> int:
        """Bytes from the first element of the view to its last."""

def copy_views(views: Sequence[View], targets: Sequence[tuple[int, int]], *, threads: int | None = None) -> None:
    """Copy the stored bytes of each view, from first element to last, to (address, length), with several threads.

    The caller keeps the memory alive and does not touch it meanwhile. File pages are released afterwards. Raises
    ValueError if a length differs from that of its view, or two targets share memory.
    """

@final
class Part:
    """One slice of rows of V = aligned - base. Both views have the same shape and `col_stride == 1`."""

    def __new__(cls, aligned: View, base: View) -> Part: ...

@final
class Factors:
    """The LoRA factors of one adapter for one module: dW = lora_b @ lora_a, lora_b (m, r), lora_a (r, n)."""

    def __new__(cls, lora_b: View, lora_a: View) -> Factors: ...

@final
class Job:
    """One module: V as `parts` stacked by rows, and the LoRA factors of every adapter for this module (may be empty).

    `transposed=False`: the stored matrix is V (m, n), as in `nn.Linear`. `transposed=True`: the stored matrix is V^T
    (n, m), as in Conv1D, embeddings and (E, in, out) expert weights.
    """

    def __new__(
        cls, name: str, parts: Sequence[Part], factors: Sequence[Factors], *, transposed: bool = False
    ) -> Job: ...
    @property
    def nbytes(self) -> int:
        """Bytes of both checkpoints that this job covers (each counted once)."""

@final
class FactorOutcome:
    """Result of projecting one adapter's factors in one module. All metrics are float64.

    With C = V V^T / ||V||_F (for every operator) `cosine` is the Frobenius cosine of C dW and dW. The other metrics
    belong to the chosen operator O, before rounding: `gain` = ||O B||_F / ||B||_F, `lora_b_norm` = ||B||_F,
    `lora_b_norm_projected` = ||O B||_F, `update_norm` = ||B A||_F, `update_norm_projected` = ||O B A||_F (LoRA scale
    not applied). `cosine` and `gain` are NaN if B or A is zero. `cosine` is also NaN if V or C dW is zero. If V is
    zero, every operator leaves B unchanged.
    """

    @property
    def cosine(self) -> float: ...
    @property
    def gain(self) -> float: ...
    @property
    def lora_b_norm(self) -> float: ...
    @property
    def lora_b_norm_projected(self) -> float: ...
    @property
    def update_norm(self) -> float: ...
    @property
    def update_norm_projected(self) -> float: ...
    def projected(self) -> bytes:
        """Return O·B, (m, r) row-major, in the stored dtype of B, rounded once to nearest even.

        Raises ValueError if the stream was made with `keep_projected=False`, and AdapterError if a value leaves the
        range of that dtype.
        """

    def projected_lora_a(self) -> bytes | None:
        """Return the new A, (r, n) row-major, in its stored dtype; None if the operator leaves A unchanged.

        Raises AdapterError like `projected`.
        """

@final
class JobOutcome:
    @property
    def index(self) -> int:
        """Position of the job in the sequence passed to the stream."""
    @property
    def v_norm(self) -> float:
        """||V||_F."""
    @property
    def rank(self) -> int | None:
        """Number of singular vectors of V that the operator uses; None if it uses none."""
    @property
    def energy(self) -> float | None:
        """Fraction of ||V||_F^2 in these vectors."""
    @property
    def spectral_norm(self) -> float | None:
        """Largest singular value of V, if the operator computes it."""
    def left_vectors(self) -> bytes:
        """Return U_k: `rank` orthonormal vectors of m float32 values each.

        Raises ValueError unless the operator uses singular vectors and the stream was made with `keep_subspace=True`.
        """
    def singular_values(self) -> list[float]:
        """Return the singular values of V for these vectors, descending. Raises ValueError like `left_vectors`."""
    @property
    def factors(self) -> list[FactorOutcome]: ...

@final
class Operator:
    """What replaces B. Formulas: docs/methods.md; user-facing names: projection/operators.py."""

    @staticmethod
    def frobenius() -> Operator: ...
    @staticmethod
    def spectral() -> Operator: ...
    @staticmethod
    def orthogonal(*, rank: int | None = None, energy: float | None = None) -> Operator:
        """Raises SettingsError unless exactly one is given: a rank of at least 1, or an energy above 0 and up to 1."""
    @staticmethod
    def attenuate(
        *,
        rank: int | None = None,
        energy: float | None = None,
        keep: float,
        sides: Literal["both", "left"] = "both",
    ) -> Operator:
        """Raises SettingsError like `orthogonal`, or if `keep` is not between 0 and 1."""
    @staticmethod
    def zero() -> Operator: ...
    @staticmethod
    def restore(*, weight: float) -> Operator:
        """For `project_update` only, like `extrapolate`."""
    @staticmethod
    def extrapolate(*, rank: int | None = None, energy: float | None = None, weight: float) -> Operator: ...

@final
class ProjectionStream(Iterator[JobOutcome]):
    """Runs jobs in the given order and yields their outcomes in that order; `next()` can be interrupted with Ctrl-C.

    `next()` raises CheckpointError if a weight or factor is NaN or infinite. Nothing follows an error. The outcome of a
    job does not depend on other jobs and adapters, on their order, or on `threads`. The orthogonal operator treats
    singular values below 1e-5 of the largest as zero, so the rank may be lower than requested.

    Work runs on private threads. Pages of finished jobs are released to the system. `close()` cancels and joins. A
    stream belongs to the process that made it: after a fork, `next()` in the child raises RuntimeError.
    """

    def __new__(
        cls,
        jobs: Sequence[Job],
        operator: Operator,
        *,
        keep_projected: bool = True,
        keep_subspace: bool = False,
        threads: int | None = None,
        seed: int = 0,
    ) -> ProjectionStream: ...
    def __iter__(self) -> ProjectionStream: ...
    def __next__(self) -> JobOutcome: ...
    @property
    def nbytes(self) -> int:
        """Bytes of both checkpoints that all jobs read."""
    @property
    def bytes_done(self) -> int: ...
    def close(self) -> None: ...

@final
class UpdateOutcome:
    """Result of projecting the full update D = finetuned - aligned of one module. All metrics are float64.

    `update_norm` = ||D||_F, `update_norm_projected` = ||O D||_F before rounding. `cosine` is that of C D and D; it is NaN
    if it was not asked for, or V, D or C D is zero. If V is zero, every operator leaves D unchanged.
    """

    @property
    def v_norm(self) -> float: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def energy(self) -> float | None: ...
    @property
    def cosine(self) -> float: ...
    @property
    def update_norm(self) -> float: ...
    @property
    def update_norm_projected(self) -> float: ...

def project_update(
    job: Job,
    finetuned: Sequence[View],
    operator: Operator,
    output: tuple[int, int],
    *,
    cosine: bool = True,
    vectors: tuple[int, int] | None = None,
    threads: int | None = None,
) -> UpdateOutcome:
    """Write aligned + O·(finetuned - aligned) to (address, length), row-major as stored, in the dtype of `finetuned`.

    `finetuned` has one view for each part of the job. Reads tiles, so memory does not grow with the module beyond
    min(m, n)^2 floats. C takes 4·m·n·min(m, n) operations; without `cosine`, other operators do not need it. The
    result does not depend on `threads`. Ctrl-C stops between tiles. The caller keeps the memory of `output` alive.

    `vectors`, the address and number k of orthonormal float32 vectors [k, m], replace the leading left singular vectors
    of V for the orthogonal operator without cosine. The base is not read then, and v_norm is NaN.

    Raises `CheckpointError` if a weight is NaN or infinite or the result leaves the range of its dtype, and ValueError
    if views or output do not fit the job.
    """

def subspace_projection(
    aligned: tuple[int, str, int, int, int],
    base: tuple[int, str, int, int, int],
    lora_b: tuple[int, str, int, int, int, int],
    output: tuple[int, str, int, int, int, int],
    *,
    normalize: Literal["frobenius", "spectral"] = "frobenius",
    transposed: bool = False,
    threads: int | None = None,
) -> float:
    """Write C·lora_b to `output` and return ||V||_F, on matrices in memory that the caller keeps alive.

    Writes zeros if V is zero. `output` may be `lora_b` itself. Raises ValueError if shapes, strides or dtypes do not
    fit, a value is NaN or infinite, or the result leaves the range of its dtype.

    A weight is (address, dtype, rows, cols, row_stride); lora_b and output are (address, dtype, rows, cols, row_stride,
    col_stride). Strides are in elements; dtypes are "F32", "BF16" or "F16", as in safetensors.
    """

def feature_distance(
    features: Sequence[tuple[int, str, tuple[int, int, int], tuple[int, int]]],
    reference: Sequence[tuple[int, str, tuple[int, int, int], tuple[int, int]]],
    mask: tuple[int, tuple[int, int]],
    segments: tuple[int, tuple[int, int]] | None,
    factors: int,
    *,
    normalize: Literal["sequence", "token", "none"] = "sequence",
    threads: int | None = None,
) -> float:
    """Sum over layers, mean over sequences, of the squared distance of (unit) hidden states in memory.

    The caller keeps them alive. Reads features and reference once, and skips tokens that do not count. Every sum is
    float64 in a fixed order, so the result does not depend on `threads` or the CPU's level. Fills `factors`, the
    address of float64 [layers, batch, tokens, 2], with the input of `feature_distance_gradient`. Raises ValueError if
    shapes, strides, dtypes or addresses do not fit.

    Each layer is (address, dtype, (batch, tokens, hidden), (batch_stride, token_stride)) with a contiguous hidden axis.
    Strides are in elements; dtypes are "F32", "BF16" or "F16", the same for features and reference of a layer. `mask`
    is (address, (batch_stride, token_stride)) of one byte per token, `segments` the same of one int64. Tokens of one
    batch row with the same segment are one sequence.
    """

def feature_distance_gradient(
    features: Sequence[tuple[int, str, tuple[int, int, int], tuple[int, int]]],
    reference: Sequence[tuple[int, str, tuple[int, int, int], tuple[int, int]]],
    factors: Sequence[int],
    outputs: Sequence[int],
    weight: float,
    *,
    threads: int | None = None,
) -> None:
    """Write `weight` times the gradient of `feature_distance` in `features` to `outputs`, contiguous, in their dtype.

    Reads features and reference once, and writes once. `factors` are, for each layer, the address of its [batch,
    tokens, 2]. Tokens that do not count get zeros and are not read. Raises ValueError if shapes, strides, dtypes or
    addresses do not fit, or an output shares memory with another tensor.
    """

@final
class Cuda:
    """The CUDA driver, and kernels that are compiled at first use and kept for each device until the process ends.

    Initializes the first of `driver` (names and paths) that can be loaded. Looks for NVRTC among `nvrtc` once a kernel
    is needed. Compiled kernels are cached in the folder `cache`, which several processes may share; if it cannot be
    written, there is no cache. Every method raises BackendError if driver or compiler is missing or fails.

    Kernels are launched on the stream of `place` (device index, address of the stream) in the device's primary context.
    They wait for nothing and allocate nothing. Addresses point to memory of that device. The caller keeps this memory
    alive and unwritten until the stream has run the launch. Raises ValueError if operands do not fit.
    """

    def __new__(cls, *, driver: Sequence[str], nvrtc: Sequence[str], cache: str | None = None) -> Cuda: ...
    @property
    def driver_version(self) -> int:
        """Driver version, such as 13020 for CUDA 13.2."""
    @property
    def device_count(self) -> int: ...
    def capability(self, device: int) -> tuple[int, int]:
        """Return the compute capability. Raises BackendError below 8.0, the minimum for the kernels."""
    def prepare(self, device: int, source: str) -> None:
        """Compile and load the kernels of a source file ahead of the first launch."""
    def feature_distance(
        self,
        place: tuple[int, int],
        features: Sequence[tuple[int, str, tuple[int, int, int], tuple[int, int]]],
        reference: Sequence[tuple[int, str, tuple[int, int, int], tuple[int, int]]],
        mask: tuple[int, tuple[int, int]],
        packing: tuple[int, int, int] | None,
        results: tuple[int, int, int, int, int, int],
        *,
        normalize: Literal["sequence", "token", "none"] = "sequence",
    ) -> None:
        """Sum over layers, mean over sequences, of the squared distance of (unit) hidden states.

        Layers and `mask` are as in the module's function of this name. `packing` holds the addresses of int32 order
        [batch, tokens], starts [batch, tokens + 1] and counts [batch], as ops/feature_distance/cuda.py makes them.
        None: each batch row is one sequence.

        `results` holds the addresses of float64 sums [layers, batch, tokens, 3], float32 factors [layers, batch,
        tokens, 2], float64 distances [layers, batch], int32 sequences [batch], a float32 share (1 / number of
        sequences, still to be multiplied into the factors) and the float32 distance. All are overwritten.
        """
    def feature_distance_gradient(
        self,
        place: tuple[int, int],
        features: Sequence[tuple[int, str, tuple[int, int, int], tuple[int, int]]],
        reference: Sequence[tuple[int, str, tuple[int, int, int], tuple[int, int]]],
        outputs: Sequence[int],
        factors: int,
        weight: int,
    ) -> None:
        """Write the float32 at `weight` times the gradient in the features to `outputs`, contiguous and in their dtype.

        A token's gradient is a·(h − h₀) − b·h with (a, b) from `factors` [layers, batch, tokens, 2], float32. If a is
        zero, as for tokens that do not count, the gradient is zero and the token is not read.
        """
    def plan(
        self,
        place: tuple[int, int],
        matrices: Sequence[Any],
        factors: Sequence[Any],
        dtypes: Mapping[Any, str],
        *,
        transposed: bool,
        captured: bool,
        results: Sequence[int] | None = None,
    ) -> CudaPlan | None:
        """Return the plan of the products of these torch tensors, which is reused while they stay in place.

        A matrix is a tensor V or a tuple (aligned, base), V = aligned − base. The products are VᵀX if `transposed`,
        else VX. `dtypes` maps torch's dtypes to "F32", "BF16" and "F16". A plan belongs to one stream. The 16 most
        recently used plans are kept; those used while a CUDA graph is `captured` are kept forever. `results` holds the
        address of each result, a multiple of 16 bytes; the lowest is then that of the results in `products`.

        Returns None if a tensor must be copied first: both weights of a pair need one dtype and contiguous rows or
        columns, and factors must be contiguous float32 at a multiple of 16 bytes. Raises ValueError if operands are too
        large, or a factor is empty.
        """
    @property
    def plans(self) -> list[int]:
        """Return the number of recently used plans and of plans kept forever."""
    def products(self, place: tuple[int, int], plan: CudaPlan, memory: tuple[int, int, int, int, int]) -> None:
        """Launch the products of a plan on the stream.

        `memory` holds the addresses of a copy of the plan's table, of float32 results, float32 partial sums and float64
        partial squares (sizes: `sizes`), and of float32 squares [modules]: ‖V‖², written only for pairs.
        """

@final
class CudaPlan:
    """How products of many matrices V with thin factors X are divided into blocks of launches.

    The bits of the results depend only on shapes.
    """

    @property
    def table(self) -> bytes:
        """Return the table that the launches need on the device."""
    @property
    def places(self) -> list[tuple[int, int, tuple[int, int]]]:
        """For each module: offset of its result, index of its square, and shape of its result; offsets in elements."""
    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of elements of results, partial sums and partial squares."""
    @property
    def memory(self) -> Any:
        """The object passed to `keep`; None before that."""
    def keep(self, memory: object) -> None:
        """Keep the object that owns the table on the device alive as long as the plan."""

def cuda_kernels(source: str, architecture: str, *, nvrtc: Sequence[str], cache: str | None = None) -> bytes:
    """Return the machine code of a source file ("feature_distance.cu") for an architecture ("sm_90"); needs no GPU.

    Raises BackendError if NVRTC is missing or does not support the architecture.
    """

def cpu_features() -> dict[str, bool]:
    """Return which CPU features are present, of those that select a kernel: avx2, fma, f16c, avx512f, ..."""

def kernel_level() -> Literal["scalar", "avx2", "avx512"]:
    """Return the level that the kernels use: the CPU's best, or SAFELORA_FAST_CPU_LEVEL if that is lower."""

def default_threads() -> int: ...
def read_seconds(regions: Sequence[tuple[int, int]], threads: int) -> float:
    """Return the seconds to read every byte of the regions (address, length) once with `threads` threads.

    For benchmarks. The caller keeps the memory alive.
    """

def update_seconds(
    regions: Sequence[tuple[int, int]], written: tuple[int, int], threads: int, *, stream: bool = False
) -> float:
    """Return the seconds to read the regions and overwrite `written`; `stream` bypasses the caches. For benchmarks.

    The caller keeps the memory alive. The content of `written` is lost.
    """

def fma_peak(threads: int) -> float:
    """Return the fused multiply-add rate of `threads` threads in registers, in FLOP/s, at the widest level."""
