"""The lora_A and lora_B matrices of a model in training, for defenses that act on the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.tensor_names import matching
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import adapter_configs, adapter_layers, without_parallel

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted module: ΔW = scale · lora_b @ lora_a.

    Attributes:
        name: the module's name in the model without PEFT.
        lora_b: lora_B's weight [m, r].
        lora_a: lora_A's weight [r, n].
        scale: LoRA's scale s.
        bias: lora_B's bias [m], also multiplied by s; None without one.
    """

    name: str
    lora_b: torch.Tensor
    lora_a: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None


def adapted_modules(model: nn.Module, *, owner: str, exclude: Sequence[str] = ()) -> list[AdaptedModule]:
    """Return the modules of the active adapter with their LoRA matrices.

    Args:
        model: the causal language model inside the PEFT wrapper.
        owner: the defense's name, for error messages.
        exclude: names or patterns of modules to skip.

    Raises:
        SettingsError: no LoRA adapter or several are active, or a module cannot be projected; the message names it.
    """
    modules: list[AdaptedModule] = []
    for name, layer in adapter_layers(model):
        factors = getattr(layer, "lora_B", None)
        if factors is None or matching(name, exclude):
            continue
        active = [adapter for adapter in layer.active_adapters if adapter in _holders(layer)]
        if len(active) > 1:
            raise SettingsError(f"{owner}: {name} has {len(active)} active adapters; activate the one in training")
        modules.extend(_one(name, layer, adapter, owner) for adapter in active)
    if not modules:
        raise SettingsError(f"{owner}: the model has no active LoRA adapter")
    return modules


def active_adapter(model: nn.Module, *, owner: str) -> str:
    """Return the name of the active LoRA adapter.

    Raises:
        SettingsError: no LoRA adapter is active, or several are.
    """
    layers = [layer for _, layer in adapter_layers(model) if hasattr(layer, "lora_B")]
    active: list[str] = sorted(
        {adapter for layer in layers for adapter in layer.active_adapters if adapter in _holders(layer)}
    )
    if not active:
        raise SettingsError(f"{owner}: the model has no active LoRA adapter")
    if len(active) > 1:
        raise SettingsError(f"{owner}: the adapters {', '.join(active)} are active; activate the one in training")
    return active[0]


def adapter_holder(model: nn.Module, *, owner: str) -> Any:
    """Return the PEFT model inside DistributedDataParallel or DeepSpeed's engine.

    Raises:
        SettingsError: the model has no adapter.
    """
    if not adapter_configs(model):
        raise SettingsError(f"{owner}: the model has no active LoRA adapter")
    return without_parallel(model)


def check_no_prompt_learning(model: nn.Module) -> None:
    """Refuse adapters with virtual tokens, because the model's positions would differ from the batch and the reference.

    Raises:
        SettingsError: the model has such an adapter; the message names its kind.
    """
    for config in adapter_configs(model).values():
        if getattr(config, "is_prompt_learning", False):
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            raise SettingsError(
                f"the adapter is of the kind {kind}, which puts virtual tokens before the batch's: defenses compare the "
                "model with its reference token by token and need LoRA, or another adapter of the weights"
            )


def _holders(layer: nn.Module) -> set[str]:
    return set(layer.lora_B) | set(getattr(layer, "lora_embedding_B", {}))


def _one(name: str, layer: nn.Module, adapter: str, owner: str) -> AdaptedModule:
    if getattr(layer, "use_dora", {}).get(adapter):
        raise SettingsError(
            f"{owner}: {name} is adapted by DoRA, whose learned magnitude undoes a projection: use plain LoRA"
        )
    if adapter in getattr(layer, "lora_variant", {}):
        raise SettingsError(f"{owner}: {name} is adapted by a variant of LoRA that is not B·A: use plain LoRA")
    if adapter not in layer.lora_B or hasattr(layer, "parameter_name"):
        raise SettingsError(f"{owner}: {name} adapts embeddings or expert parameters: exclude it from the adapter")
    lora_b, lora_a = (getattr(factors[adapter], "weight", None) for factors in (layer.lora_B, layer.lora_A))
    if lora_b is None or lora_a is None:
        raise SettingsError(
            f"{owner}: {name} is adapted by {type(layer).__module__.split('.')[-2]}, whose update is not B·A: use plain LoRA"
        )
    if lora_b.dim() != 2:
        raise SettingsError(f"{owner}: {name} is a convolution: exclude it from the adapter")
    bias = getattr(layer.lora_B[adapter], "bias", None)
    return AdaptedModule(name, lora_b, lora_a, float(layer.scaling[adapter]), bias)
