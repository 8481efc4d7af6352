"""C·B with SafeLoRA's C = V·Vᵀ/‖V‖_F, or P_k·B with an orthonormal basis, for one module or many at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.ops.base import DTYPE_NAMES, Op, require_tensors
from safelora_fast.ops.subspace_projection.torch_impl import ALIGNMENT, GroupedProjector, Matrix, Torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from safelora_fast.ops.base import Example
    from safelora_fast.ops.subspace_projection.torch_impl import Normalize, Prepared

__all__ = [
    "OP",
    "Matrix",
    "Projection",
    "matrix_products",
    "prepared_products",
    "subspace_projection",
    "subspace_projections",
    "transposed_products",
]


@dataclass(frozen=True)
class Projection:
    """One module's projected lora_B, float32, and the r×r products that the cosine needs.

    Attributes:
        product: S = C·B or P_k·B [m, r]; B itself if V is zero.
        v_norm: ‖V‖_F, a scalar; NaN for an orthonormal basis.
        gram: BᵀB [r, r].
        cross_gram: BᵀS.
        product_gram: SᵀS.
    """

    product: torch.Tensor
    v_norm: torch.Tensor
    gram: torch.Tensor
    cross_gram: torch.Tensor
    product_gram: torch.Tensor

    def cosine(self, right_gram: torch.Tensor) -> torch.Tensor:
        """Return the Frobenius cosine of S·A and B·A, a float64 scalar; NaN if either is zero.

        Args:
            right_gram: A·Aᵀ [r, r].
        """
        right = right_gram.double()
        cross, product, plain = (
            (gram.double() * right).sum() for gram in (self.cross_gram, self.product_gram, self.gram)
        )
        return cross / (product * plain).sqrt()


def subspace_projection(
    aligned_weight: torch.Tensor,
    base_weight: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    normalize: Normalize = "frobenius",
) -> torch.Tensor:
    """Project B onto the alignment subspace of one module: C·B with V = aligned_weight − base_weight.

    Hsu et al. 2024 (arXiv 2405.16833), equation 2, computed as V·(Vᵀ·B)/‖V‖_F, so neither V nor C is formed. On the CPU
    the weights are read in place. On a GPU each of two passes is a Triton kernel. Elsewhere, and for the spectral norm
    on a GPU, torch runs the same algebra. `SAFELORA_FAST_BACKEND` selects another backend (ops/base.py).

    Args:
        aligned_weight: [out_features, in_features]; float32, bfloat16 or float16.
        base_weight: the same shape; its dtype may differ.
        lora_b: [out_features, rank]; any strides.
        normalize: "frobenius" divides V·Vᵀ by ‖V‖_F, as in the paper; "spectral" divides by σ₁(V)², for a gain of at
            most 1.

    Returns:
        A new tensor with the device and dtype of lora_b, without gradient. It equals lora_b if V is zero.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an input requires grad while gradients are recorded.
        BackendError: the backend that `SAFELORA_FAST_BACKEND` names cannot serve these tensors.
    """
    named = {"aligned_weight": aligned_weight, "base_weight": base_weight, "lora_b": lora_b}
    require_tensors(**named)
    for name, tensor in named.items():
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be a matrix, not of shape {list(tensor.shape)}")
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {tensor.dtype}; float32, bfloat16 and float16 can be projected")
        if tensor.device != lora_b.device:
            raise ValueError(f"{name} is on {tensor.device}, but lora_b on {lora_b.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, which the projection does not propagate; call it under torch.no_grad()"
            )
    if aligned_weight.shape != base_weight.shape:
        raise ValueError(f"aligned_weight is {list(aligned_weight.shape)}, but base_weight {list(base_weight.shape)}")
    if lora_b.shape[0] != aligned_weight.shape[0]:
        raise ValueError(
            f"lora_b has {lora_b.shape[0]} rows, but the weights have {aligned_weight.shape[0]}: B is [out_features, rank]"
        )
    if normalize not in {"frobenius", "spectral"}:
        raise ValueError(f'normalize is {normalize!r}, it must be "frobenius" or "spectral"')
    if torch.compiler.is_compiling():
        product: torch.Tensor
        (product,) = _node([aligned_weight], [base_weight], [True], [lora_b], normalize, False)
        return product
    return _projected_one((aligned_weight, base_weight), lora_b, normalize)


def subspace_projections(matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[Projection]:
    """Project lora_B of every module onto the module's own alignment subspace (Hsu et al. 2024, arXiv 2405.16833).

    For a pair of weights, V = aligned − base, and the result is the paper's C·B, C = V·Vᵀ/‖V‖_F, computed as
    V·(VᵀB)/‖V‖_F. For an orthonormal basis U_k it is P_k·B = U_k·(U_kᵀB). V, C and P_k are never formed.

    On a GPU each pass is one launch for all modules with the same dtypes and layout, longest first. Sums are float32 in
    an order that depends only on shapes. Float32 products are split rather than rounded to tf32. The CPU computes one
    module at a time.

    Args:
        matrices: per module (aligned, base), [m, n] each, or U_k [m, k]; float32, bfloat16 or float16, with contiguous
            rows or columns (others are copied).
        factors: per module lora_B [m, r], on the device of its matrix; any strides.

    Raises:
        ValueError: shapes or devices do not fit, or there is no module.
        BackendError: the backend that `SAFELORA_FAST_BACKEND` names cannot serve these tensors.
    """
    _check(matrices, factors, 0)
    is_pair = [isinstance(matrix, tuple) for matrix in matrices]
    if torch.compiler.is_compiling():
        minuends = [matrix[0] if isinstance(matrix, tuple) else matrix for matrix in matrices]
        subtrahends = [matrix[1] for matrix in matrices if isinstance(matrix, tuple)]
        flat = _node(minuends, subtrahends, is_pair, list(factors), "frobenius", True)
    else:
        flat = _projected(matrices, factors)
    count = len(factors)
    products, norms, grams, crosses, squares = (flat[start : start + count] for start in range(0, 5 * count, count))
    # A basis has no ‖V‖. NaN is set here, because torch's operation checks compare results with ==.
    norms = [norm if pair else torch.full_like(norm, math.nan) for norm, pair in zip(norms, is_pair, strict=True)]
    return [Projection(*module) for module in zip(products, norms, grams, crosses, squares, strict=True)]


def transposed_products(
    matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return Mᵀ·X of every module [columns, rank], and ‖M‖²_F [modules] (zero for a single matrix), float32."""
    _check(matrices, factors, 0)
    found: tuple[list[torch.Tensor], torch.Tensor] = _backend(matrices, factors).transposed_products(matrices, factors)
    return found


def matrix_products(matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return M·X of every module [rows, rank], float32."""
    _check(matrices, factors, 1)
    found: list[torch.Tensor] = _backend(matrices, factors).products(matrices, factors)
    return found


def prepared_products(
    matrices: Sequence[torch.Tensor],
    factors: Sequence[torch.Tensor],
    *,
    transposed: bool,
    outputs: Sequence[torch.Tensor] | None = None,
) -> Prepared | None:
    """Return the launches of Mᵀ·X or M·X of every module, to be made again and again on the same memory.

    All is checked and planned here, so a launch takes the host microseconds instead of milliseconds for hundreds of
    modules. It reads the values that the operands have then. Launch only while every operand is where it was.

    Args:
        matrices: M [rows, columns] of every module, float32 and contiguous.
        factors: X, float32, contiguous, and aligned to 16 bytes.
        transposed: Mᵀ·X instead of M·X.
        outputs: overwritten by the results: float32, contiguous, and aligned to 16 bytes; else a call allocates memory.

    Returns:
        None if the backend computes one module at a time, or would have to copy an operand.

    Raises:
        ValueError: shapes or devices do not fit.
    """
    _check(matrices, factors, 0 if transposed else 1)
    backend = _backend(matrices, factors)
    is_read_in_place = all(
        operand.dtype == torch.float32 and operand.is_contiguous() and operand.data_ptr() % ALIGNMENT == 0
        for operand in (*matrices, *factors, *(outputs or ()))
    )
    if not (isinstance(backend, GroupedProjector) and is_read_in_place):
        return None
    return backend.prepared(matrices, factors, transposed=transposed, outputs=outputs)


def _projected_one(pair: tuple[torch.Tensor, torch.Tensor], lora_b: torch.Tensor, normalize: Normalize) -> torch.Tensor:
    with torch.no_grad():
        product: torch.Tensor = _backend([pair], [lora_b]).project_one(pair, lora_b, normalize)
        return product


def _projected(matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Products, norms and the three Gram matrices, each of all modules."""
    with torch.no_grad():
        found = _backend(matrices, factors).project(matrices, factors)
        products, norms = ([result.float() for result in results] for results in found)
        grams, _ = transposed_products([*factors, *factors, *products], [*factors, *products, *products])
    return [*products, *norms, *grams]


def _backend(matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> Any:
    return OP.choose([*_parts(matrices), *factors]).backend


def _parts(matrices: Sequence[Matrix]) -> list[torch.Tensor]:
    return [part for matrix in matrices for part in (matrix if isinstance(matrix, tuple) else (matrix,))]


def _check(matrices: Sequence[Matrix], factors: Sequence[torch.Tensor], axis: int) -> None:
    """Raise ValueError unless every factor has `matrix.shape[axis]` rows and all tensors share one device."""
    if len(matrices) != len(factors) or not factors:
        raise ValueError(f"{len(matrices)} matrices and {len(factors)} factors; one factor belongs to each matrix")
    operands = [*_parts(matrices), *factors]
    if not all(isinstance(operand, torch.Tensor) for operand in operands):
        require_tensors(**{f"operands[{index}]": operand for index, operand in enumerate(operands)})
    device = factors[0].device
    for index, (matrix, factor) in enumerate(zip(matrices, factors, strict=True)):
        first, last = matrix if isinstance(matrix, tuple) else (matrix, matrix)
        shape = first.shape
        if len(shape) != 2 or last.shape != shape or factor.ndim != 2:
            shapes = ", ".join(str(list(part.shape)) for part in (*_parts([matrix]), factor))
            raise ValueError(f"module {index}: {shapes} are not matrices that fit")
        if shape[axis] != factor.shape[0]:
            raise ValueError(f"module {index}: the factor has {factor.shape[0]} rows, but the matrix is {list(shape)}")
        if factor.device != device or first.device != device or last.device != device:
            raise ValueError(f"module {index} is not on {device}, where the first one is; group modules by device")


# For torch.compile and export: a torch.library operation, an opaque node in the graph, without gradient.
@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "safelora_fast::subspace_projection",
    mutates_args=(),
    schema="(Tensor[] minuends, Tensor[] subtrahends, bool[] is_pair, Tensor[] factors, str normalize, bool with_grams) "
    "-> Tensor[]",
)
def _node(
    minuends: Sequence[torch.Tensor],
    subtrahends: Sequence[torch.Tensor],
    is_pair: Sequence[bool],
    factors: Sequence[torch.Tensor],
    normalize: Any,
    with_grams: bool,
) -> list[torch.Tensor]:
    """Products in the dtypes of the factors; or float32 products, norms (zero for a basis) and Gram matrices."""
    others = iter(subtrahends)
    matrices = [(whole, next(others)) if pair else whole for whole, pair in zip(minuends, is_pair, strict=True)]
    if not with_grams:
        results = [_projected_one(pair, factor, normalize) for pair, factor in zip(matrices, factors, strict=True)]
    else:
        results, count = _projected(matrices, factors), len(factors)
        for index, pair in enumerate(is_pair):
            results[count + index] = results[count + index] if pair else torch.zeros_like(results[count + index])
    # They share one piece of memory, which results of an operation may not do.
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in results]


@_node.register_fake  # type: ignore[untyped-decorator]
def _(*inputs: Any) -> list[torch.Tensor]:
    minuends, _, _, factors, _, with_grams = inputs
    if not with_grams:
        return [torch.empty(factor.shape, dtype=factor.dtype, device=factor.device) for factor in factors]
    exact = torch.float32
    products = [
        factor.new_empty((len(whole), factor.shape[1]), dtype=exact)
        for whole, factor in zip(minuends, factors, strict=True)
    ]
    norms = [factor.new_empty((), dtype=exact) for factor in factors]
    grams = [factor.new_empty((factor.shape[1], factor.shape[1]), dtype=exact) for _ in range(3) for factor in factors]
    return [*products, *norms, *grams]


def _examples(random: Callable[..., torch.Tensor]) -> Iterator[Example]:
    """One module with each normalization; then pairs of odd shapes together with an orthonormal basis."""
    aligned, base, factor = random(96, 80), random(96, 80, seed=1), random(96, 5, seed=2)
    for normalize in ("frobenius", "spectral"):
        yield (
            lambda *given, normalize=normalize: subspace_projection(*given, normalize=normalize),
            (aligned, base, factor),
        )
    basis = torch.linalg.qr(random(40, 6, seed=4).float())[0].to(aligned.dtype)

    def many(
        aligned: torch.Tensor, base: torch.Tensor, basis: torch.Tensor, *factors: torch.Tensor
    ) -> list[torch.Tensor]:
        pair, all_of_it, alone = subspace_projections(
            [(aligned[:33, :50], base[:33, :50]), (aligned, base), basis], factors
        )
        results = [
            (found.product, found.gram, found.cross_gram, found.product_gram) for found in (pair, all_of_it, alone)
        ]
        return [pair.v_norm, all_of_it.v_norm, *(tensor for module in results for tensor in module)]

    yield many, (aligned, base, basis, random(33, 17, seed=3), factor, random(40, 3, seed=6))


OP = Op("subspace_projection", reference=Torch, backends=("native", "triton", "cuda"), examples=_examples)
