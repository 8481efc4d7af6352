"""Adapters whose product is added in place: one product instead of a product, a multiplication and an addition.

A LoRA layer makes its update as a matrix as large as its output, scales it and adds it, each time with fresh memory: beside the
products of a small model that takes as long as they do. For scores without gradients B·(A·x) is accumulated onto W·x by
the product itself, which also leaves out a rounding of the update in 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import nn


class AddedInPlace:
    """Stands where PEFT keeps variants of LoRA: it asks for the layer's output with the adapter, given that without."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_options: Any
    ) -> torch.Tensor:
        """W·x + s·B·(A·x), where `result` is W·x and is changed."""
        down, up = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        scaling = module.scaling[active_adapter]
        inner = nn.functional.linear(x, down)
        if result.dtype != up.dtype or not result.is_contiguous():
            return result + nn.functional.linear(inner, up) * scaling
        result.view(-1, result.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), up.T, alpha=scaling)
        return result


def add_in_place(adapted: nn.Module) -> None:
    """Let every plain LoRA layer of a PEFT model add in place; gradients are then none of its any more.

    Layers with a variant of PEFT's (DoRA and others), with a bias, or of another kind stay as they are.
    """
    for module in adapted.modules():
        if type(module) is not lora.Linear or not isinstance(getattr(module, "lora_variant", None), dict):
            continue
        for name, up in module.lora_B.items():
            if name not in module.lora_variant and type(up) is nn.Linear and up.bias is None:
                module.lora_variant[name] = AddedInPlace()
