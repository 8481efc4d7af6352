"""Penalty on the part of the weight update outside the safe subspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from safelora_fast.defenses.base import Run, Weighted, check_subspace
from safelora_fast.defenses.step_cost import Extra
from safelora_fast.files.argument_checks import patterns

if TYPE_CHECKING:
    from safelora_fast.defenses.parts.safe_modules import SafeModules
    from safelora_fast.defenses.step_cost import Shape, Work
    from safelora_fast.subspace.safe_subspace import SafeSubspace


class SubspacePenalty(Weighted):
    """λ · Σ over modules of ‖(I − P_k)ΔW‖²_F with P_k = U_k·U_kᵀ (AsFT, arXiv 2506.08473, with a true projector).

    With R = B − U(UᵀB) it equals s²·tr(RᵀR·AAᵀ), so no matrix of the weight's shape is built. It counts once per
    optimizer step.

    Args:
        subspace: the safe subspace of the model's aligned and base checkpoints.
        weight: λ; 1 in the paper.
        exclude: names or patterns ("lm_head", "layers.0.*") of modules without a penalty.

    Raises:
        SettingsError: the weight is out of range.
    """

    name: ClassVar[str] = "subspace_penalty"

    def __init__(self, subspace: SafeSubspace, weight: float = 1.0, *, exclude: list[str] | None = None) -> None:
        super().__init__(weight)
        check_subspace(subspace, owner="SubspacePenalty")
        self.subspace = subspace
        self.exclude = patterns("SubspacePenalty: exclude", exclude)

    def __repr__(self) -> str:
        return f"SubspacePenalty(weight={self.weight})"

    def attach(self, run: Run) -> SafeModules:
        """Return the adapted modules with their U_k, which compute the penalties."""
        from safelora_fast.defenses.parts.safe_modules import SafeModules

        return SafeModules(run.model, self.subspace, owner="SubspacePenalty", exclude=self.exclude)

    def cost(self, shape: Shape, work: Work) -> Extra:
        """Estimate the cost of products with U_k and of [r, r] Gram matrices."""
        sizes = list(shape.with_subspace(self.subspace.settings.get("rank")))
        flops = sum(3 * (4 * m * k * r + 2 * r * r * (m + n)) for m, n, r, k in sizes)
        memory = float(sum(4 * m * k for m, _, _, k in sizes))
        return Extra(flops * work.micro_batches, memory, "products with U_k and small Grams, in every micro-batch")
