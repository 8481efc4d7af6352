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
    "read_index",
    "read_seconds",
    "subspace_projection",
    "update_seconds",
]

__version__: str

@final
class SafetensorsFile:
    """A memory-mapped safetensors file whose header has been checked against the file.

    Raises `safelora_fast.errors.CheckpointError` when the file is missing, truncated, or its header lies.
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
        """name -> (dtype as safetensors spells it, shape, begin, end); offsets are bytes from the start of the file."""
    def read(self, name: str) -> bytes:
        """The bytes of one tensor (a copy)."""

def read_index(path: str) -> dict[str, str]:
    """`weight_map` of a `*.safetensors.index.json`: tensor name -> absolute path of its shard.

    Refuses entries that leave the index's folder and files that do not exist (`CheckpointError`).
    """

@final
class View:
    """A strided matrix inside a tensor of a file; offsets and strides in elements. Bounds are checked here."""

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
        """Bytes of the elements that the view covers."""

def copy_views(views: Sequence[View], targets: Sequence[tuple[int, int]], *, threads: int | None = None) -> None:
    """Copy the stored bytes of each view, from its first element to its last, to (address, length), by several threads.

    The caller keeps the memory alive and lets nobody else use it meanwhile; pages of the files are given back. Raises
    ValueError when a length is another than the view has, or two targets share memory.
    """

@final
class Part:
    """One block of rows of V = aligned - base. Both views have the same shape and `col_stride == 1`."""

    def __new__(cls, aligned: View, base: View) -> Part: ...

@final
class Factors:
    """The LoRA factors of one adapter for one module: dW = lora_b @ lora_a, lora_b (m, r), lora_a (r, n)."""

    def __new__(cls, lora_b: View, lora_a: View) -> Factors: ...

@final
class Job:
    """One module: V from `parts` stacked by rows, and the factors of every adapter that touches the module, if any.

    `transposed=False`: the stored matrix is V (m, n), as `nn.Linear` keeps it. `transposed=True`: the stored matrix is
    V^T (n, m), as Conv1D, embeddings and (E, in, out) expert weights keep it.
    """

    def __new__(
        cls, name: str, parts: Sequence[Part], factors: Sequence[Factors], *, transposed: bool = False
    ) -> Job: ...
    @property
    def nbytes(self) -> int:
        """Bytes of both checkpoints that this job covers (each counted once)."""

@final
class FactorOutcome:
    """What projection does to one adapter's factors in one module. All figures are float64.

    With C = V V^T / ||V||_F (whatever the operator) `cosine` is the Frobenius cosine of C dW and dW. The other
    figures belong to the operator that was asked for, here O, before rounding: `gain` = ||O B||_F / ||B||_F,
    `lora_b_norm` = ||B||_F, `lora_b_norm_projected` = ||O B||_F, `update_norm` = ||B A||_F, `update_norm_projected` = ||O
    B A||_F (LoRA scale not applied). `cosine` and `gain` are NaN where B or A is zero; `cosine` is NaN too where V is
    zero or C dW is zero. Where V is zero every operator leaves B as it is.
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
        """O·B, (m, r) row-major, in the stored dtype of B, rounded once to nearest even.

        Raises ValueError when the stream was made with `keep_projected=False`, AdapterError when a value leaves the
        range of that dtype.
        """

    def projected_lora_a(self) -> bytes | None:
        """What A becomes, (r, n) row-major, in its stored dtype; None where the operator leaves A as it is.

        Raises AdapterError as `projected`.
        """

@final
class JobOutcome:
    @property
    def index(self) -> int:
        """Position of the job in the sequence that was given."""
    @property
    def v_norm(self) -> float:
        """||V||_F."""
    @property
    def rank(self) -> int | None:
        """How many singular vectors of V the operator uses; None of an operator without any."""
    @property
    def energy(self) -> float | None:
        """Share of ||V||_F^2 that these vectors hold."""
    @property
    def spectral_norm(self) -> float | None:
        """Largest singular value of V (of operators that look for it)."""
    def left_vectors(self) -> bytes:
        """U_k: `rank` orthonormal vectors of m float32 values each.

        Raises ValueError unless the operator uses them and the stream was made with `keep_subspace=True`.
        """
    def singular_values(self) -> list[float]:
        """The singular values of V that belong to them, descending. Raises ValueError as `left_vectors`."""
    @property
    def factors(self) -> list[FactorOutcome]: ...

@final
class Operator:
    """What replaces B; docs/methods.md has the formulas, and projection/operators.py the names that users give them."""

    @staticmethod
    def frobenius() -> Operator: ...
    @staticmethod
    def spectral() -> Operator: ...
    @staticmethod
    def orthogonal(*, rank: int | None = None, energy: float | None = None) -> Operator:
        """Raises SettingsError unless exactly one is given: a rank of at least 1, or a share above 0 and up to 1."""
    @staticmethod
    def attenuate(
        *,
        rank: int | None = None,
        energy: float | None = None,
        keep: float,
        sides: Literal["both", "left"] = "both",
    ) -> Operator:
        """Raises SettingsError as `orthogonal`, or when `keep` does not lie between 0 and 1."""
    @staticmethod
    def zero() -> Operator: ...

@final
class ProjectionStream(Iterator[JobOutcome]):
    """Runs jobs in the order given and yields their outcomes in that order; `next()` honors Ctrl-C.

    `next()` raises CheckpointError where a weight or factor is NaN or infinite; nothing comes after an error.
    Outcomes of a job do not depend on the jobs and adapters beside it, on their order or on `threads`. The orthogonal
    operator treats singular values below 1e-5 of the largest as zero; the rank may come out lower than asked for.

    Work runs on private threads; pages of finished jobs are given back to the system. `close()` cancels and joins. A
    stream belongs to the process that made it: after a fork, the child's `next()` raises RuntimeError.
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
        """Bytes of both checkpoints that all jobs cover."""
    @property
    def bytes_done(self) -> int: ...
    def close(self) -> None: ...

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

    Zeros are written where V is zero. `output` may be `lora_b` itself. Raises ValueError when shapes, strides or dtypes
    do not fit, a value is NaN or infinite, or the result leaves the range of its dtype.

    A weight is (address, dtype, rows, cols, row_stride); lora_b and output are (address, dtype, rows, cols, row_stride,
    col_stride); strides in elements, dtypes as safetensors spells them ("F32", "BF16", "F16").
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
    """Sum over blocks, mean over sequences, of the squared distance of (unit) hidden states that the caller keeps alive.

    One read of features and reference; of tokens that do not count, none. Every sum is in float64 and in one order, so
    that the result does not depend on `threads` or the CPU's level. Fills `factors`, the address of float64 [blocks,
    batch, tokens, 2], with what `feature_distance_gradient` takes. Raises ValueError when shapes, strides, dtypes or
    addresses do not fit.

    Each block is (address, dtype, (batch, tokens, hidden), (batch_stride, token_stride)) with a contiguous hidden axis;
    strides in elements, dtypes as safetensors spells them ("F32", "BF16", "F16"), a block's both the same. `mask` is
    (address, (batch_stride, token_stride)) of one byte per token, `segments` the same of one int64: tokens of one row
    and one segment are a sequence.
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
    """Write `weight` times the gradient of `feature_distance` in `features` to `outputs`, contiguous and in their dtype.

    One read of features and reference, one write. `factors` are, for each block, the address of its [batch, tokens, 2].
    Tokens that do not count get zeros and are not read. Raises ValueError when shapes, strides, dtypes or addresses do
    not fit, or an output shares memory with another tensor.
    """

@final
class Cuda:
    """The CUDA driver, and kernels that are compiled when first used and kept for each device until the process ends.

    The first of `driver` (names and paths) that can be loaded is initialized; NVRTC is looked for among `nvrtc` once a
    kernel is needed. Compiled kernels are kept in the folder `cache`, safe against other processes; one that cannot be
    written is done without. Every method raises BackendError where driver or compiler is missing or refuses.

    Kernels are put on the stream of `place` (number of the device, address of the stream) in the device's primary
    context. They wait for nothing and allocate nothing. Addresses are those of memory of that device, which the caller
    keeps alive and unwritten until the stream has come so far. ValueError is raised when operands do not fit.
    """

    def __new__(cls, *, driver: Sequence[str], nvrtc: Sequence[str], cache: str | None = None) -> Cuda: ...
    @property
    def driver_version(self) -> int:
        """As 13020 for CUDA 13.2."""
    @property
    def device_count(self) -> int: ...
    def capability(self, device: int) -> tuple[int, int]:
        """Compute capability. Raises BackendError below 8.0, which the kernels need."""
    def prepare(self, device: int, source: str) -> None:
        """Compile and load the kernels of a file, so that the first launch need not."""
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
        """Sum over blocks, mean over sequences, of the squared distance of (unit) hidden states.

        Blocks and `mask` are as in the function of this name. `packing` holds the addresses of int32 order [batch,
        tokens], starts [batch, tokens + 1] and counts [batch], as ops/feature_distance/cuda.py makes them; None: a
        row is a sequence. `results` are the addresses of float64 sums [blocks, batch, tokens, 3], float32 factors
        [blocks, batch, tokens, 2], float64 distances [blocks, batch], int32 sequences [batch], a float32 share (one
        divided by the number of sequences, by which factors are still to be multiplied) and the float32 distance; all
        are overwritten.
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

        A token's gradient is a·(h − h₀) − b·h with (a, b) from `factors` [blocks, batch, tokens, 2], float32. Tokens
        whose a is zero, as those that do not count, get zeros and are not read.
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
    ) -> CudaPlan | None:
        """The plan of the products of these torch tensors, made once for as long as they stay where they are.

        A matrix is a tensor V or a tuple (aligned, base), V = aligned − base. The products are VᵀX where `transposed`, else
        VX. A plan is of one stream. The 16 that were used last are kept, and for good those found while a CUDA graph is
        `captured`. `dtypes` has the names "F32", "BF16" and "F16" of torch's dtypes. None: a tensor must be copied first, so
        that the weights of a pair have one dtype, rows or columns are contiguous, and factors are contiguous float32 at a
        multiple of 16 bytes. Raises ValueError when operands are too large, or a factor is empty.
        """
    @property
    def plans(self) -> list[int]:
        """How many plans are kept for now, and for good."""
    def products(self, place: tuple[int, int], plan: CudaPlan, memory: tuple[int, int, int, int, int]) -> None:
        """Put the products of a plan on the stream.

        `memory` holds the addresses of a copy of the plan's table, of float32 results, float32 partial and float64
        partial squares with as many elements as the plan says, and of float32 squares [modules]: ‖V‖², written for
        pairs alone.
        """

@final
class CudaPlan:
    """How products of many matrices V with thin factors X are cut into blocks of launches.

    Bits of the results depend on shapes alone.
    """

    @property
    def table(self) -> bytes:
        """What the launches need on the device."""
    @property
    def places(self) -> list[tuple[int, int, tuple[int, int]]]:
        """Of each module: first element of its result among all results, place of its square, and shape of its result."""
    @property
    def sizes(self) -> tuple[int, int, int]:
        """Elements of results, partial sums and partial squares."""
    @property
    def memory(self) -> Any:
        """What `keep` was given; None before."""
    def keep(self, memory: object) -> None:
        """Keep what holds the table on the device as long as the plan."""

def cuda_kernels(source: str, architecture: str, *, nvrtc: Sequence[str], cache: str | None = None) -> bytes:
    """Machine code of one file of kernels ("feature_distance.cu") for one architecture ("sm_90"); needs no GPU.

    Raises BackendError without NVRTC, or where it does not know the architecture.
    """

def cpu_features() -> dict[str, bool]:
    """Features that the kernels look for: avx2, fma, f16c, avx512f, ..."""

def kernel_level() -> Literal["scalar", "avx2", "avx512"]:
    """The level that the kernels use here: the best the CPU has, or SAFELORA_FAST_CPU_LEVEL where that is lower."""

def default_threads() -> int: ...
def read_seconds(regions: Sequence[tuple[int, int]], threads: int) -> float:
    """Seconds to read every byte of the regions (address, length) once with `threads` threads; for benchmarks.

    The caller keeps the memory alive.
    """

def update_seconds(
    regions: Sequence[tuple[int, int]], written: tuple[int, int], threads: int, *, stream: bool = False
) -> float:
    """Seconds to read the regions and to overwrite another one, past the caches with `stream`; for benchmarks.

    The caller keeps the memory alive, and loses what was in `written`.
    """

def fma_peak(threads: int) -> float:
    """Fused multiply-add rate of `threads` threads on registers alone, in FLOP/s, at the widest level; for benchmarks."""
