"""Checks that a reference model is the model before fine-tuning: nothing that it uses is trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from safelora_fast.checkpoints.lora_config import KEEPS_BASE_WEIGHTS
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import Anatomy, adapter_configs, adapter_layers, dissect


def check_base_reference(model: nn.Module) -> None:
    """Refuse a model that does not return to its state before fine-tuning when its adapters are disabled."""
    layers = adapter_layers(model)
    if not layers:
        raise SettingsError(
            "the model has no adapter to disable: wrap it with PEFT, or give the model before fine-tuning as reference="
        )
    for name, config in adapter_configs(model).items():
        if getattr(config, "is_prompt_learning", False):
            raise SettingsError(f"adapter {name!r} adds tokens to the prompt, which the reference lacks")
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.lower() not in KEEPS_BASE_WEIGHTS:
            raise SettingsError(
                f"adapter {name!r} was initialized by {start!r}, which may rewrite the base weights: with the "
                "adapter disabled the model is not the original; use a plain initialization, or give a frozen copy of the "
                "adapter as reference="
            )
        _check_bias(name, config)
    _check_trained(model, layers)


def check_named_reference(model: nn.Module, name: str) -> None:
    """Refuse an adapter that does not exist or is in training, and a model with other trained weights."""
    named = adapter_layers(model)
    known = sorted({adapter for _, layer in named for adapter in adapter_names(layer)})
    if name not in known:
        raise SettingsError(f"reference adapter {name!r} does not exist; the model has {', '.join(known) or 'none'}")
    if any(name in layer.active_adapters for _, layer in named):
        raise SettingsError(f"reference adapter {name!r} is the one in training: load a frozen copy under another name")
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name and parameter.requires_grad:
            raise SettingsError(f"reference adapter {name!r} is trained ({parameter_name}): freeze it")
    for adapter, config in adapter_configs(model).items():
        _check_bias(adapter, config)
    _check_trained(model, named)


def check_second_model(anatomy: Anatomy, reference: nn.Module) -> Anatomy:
    """Return the parts of a second model; refuse one with other layers or widths than the model in training."""
    other = dissect(reference)
    if other.model is anatomy.model:
        raise SettingsError('reference= is the model in training: give a frozen copy, or "base"')
    if other.depth != anatomy.depth or other.config.hidden_size != anatomy.config.hidden_size:
        raise SettingsError(
            f"the reference has {other.depth} layers of width {other.config.hidden_size}, "
            f"the model {anatomy.depth} of width {anatomy.config.hidden_size}"
        )
    return other


def _check_trained(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> None:
    """Refuse a model that trains weights outside its adapters, because the reference shares them."""
    adapter_parameters = set()
    for name, layer in layers:
        if getattr(layer, "merged", False):
            raise SettingsError(f"{name}: the adapter is merged into the weight: unmerge it first")
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
        originals = {id(parameter) for parameter in base.parameters()}
        adapter_parameters |= {id(parameter) for parameter in layer.parameters()} - originals
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in adapter_parameters:
            raise SettingsError(
                f"{name} is trained and belongs to no adapter, so the reference, which shares it, would be trained too: "
                "freeze it, or give a frozen copy of the model as reference="
            )


def _check_bias(name: str, config: Any) -> None:
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise SettingsError(
            f'adapter {name!r} trains biases (bias="{bias}"), which switching it off does not undo: use bias="none", '
            "or give a second model as reference="
        )


def adapter_names(layer: nn.Module) -> set[str]:
    """Return the names of a PEFT layer's adapters."""
    holders = [getattr(layer, attribute, None) for attribute in layer.adapter_layer_names]
    return {name for holder in holders if isinstance(holder, nn.ModuleDict | nn.ParameterDict) for name in holder}
