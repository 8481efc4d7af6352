"""What can serve as reference, and what it can be run on: refused where it would not be the model before fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from safelora_fast.checkpoints.lora_config import KEEPS_BASE_WEIGHTS
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import Anatomy, adapter_layers, dissect

if TYPE_CHECKING:
    from safelora_fast.models.capture import Call


def check_base_reference(model: nn.Module) -> None:
    """Refuse models for which disabling the adapters does not give back the model before fine-tuning.

    Raises:
        SettingsError: with the module or parameter and the reason.
    """
    layers = adapter_layers(model)
    if not layers:
        raise SettingsError(
            "the model has no adapter to disable: wrap it with PEFT, or give the model before fine-tuning as reference="
        )
    for name, config in _adapter_configs(model).items():
        _check_config(name, config)
    _check_trained(model, layers)


def _check_trained(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> None:
    """Refuse a model whose weights outside its adapters change: they would change the reference too."""
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


def check_named_reference(model: nn.Module, name: str) -> None:
    """Refuse an adapter name that does not exist or that is the one in training, and a model trained beside its adapters.

    Raises:
        SettingsError: with the adapters that exist, or what is trained.
    """
    named = adapter_layers(model)
    layers = [layer for _, layer in named]
    known = sorted({adapter for layer in layers for adapter in adapter_names(layer)})
    if name not in known:
        raise SettingsError(f"reference adapter {name!r} does not exist; the model has {', '.join(known) or 'none'}")
    if any(name in layer.active_adapters for layer in layers):
        raise SettingsError(f"reference adapter {name!r} is the one in training: load a frozen copy under another name")
    for name_, parameter in model.named_parameters():
        if f".{name}." in name_ and parameter.requires_grad:
            raise SettingsError(f"reference adapter {name!r} is trained ({name_}): freeze it")
    for adapter, config in _adapter_configs(model).items():
        _check_bias(adapter, config)
    _check_trained(model, named)


def check_second_model(anatomy: Anatomy, reference: nn.Module) -> Anatomy:
    """The parts of a second model; refuse one that cannot be compared block by block with the model in training.

    Raises:
        SettingsError: it is the model in training, or has another number of blocks or another width.
    """
    other = dissect(reference)
    if other.model is anatomy.model:
        raise SettingsError('reference= is the model in training: give a frozen copy, or "base"')
    if other.depth != anatomy.depth or other.config.hidden_size != anatomy.config.hidden_size:
        raise SettingsError(
            f"the reference has {other.depth} blocks of width {other.config.hidden_size}, "
            f"the model {anatomy.depth} of width {anatomy.config.hidden_size}"
        )
    return other


def _adapter_configs(model: nn.Module) -> dict[str, Any]:
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    configs = getattr(model, "peft_config", None)
    return dict(configs) if configs else {}


def _check_config(name: str, config: Any) -> None:
    if getattr(config, "is_prompt_learning", False):
        raise SettingsError(f"adapter {name!r} adds tokens to the prompt, which the reference lacks")
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in KEEPS_BASE_WEIGHTS:
        raise SettingsError(
            f"adapter {name!r} was initialized by {init!r}, which may rewrite the base weights: with the "
            "adapter disabled the model is not the original; use a plain initialization, or give a frozen copy of the "
            "adapter as reference="
        )
    _check_bias(name, config)


def adapter_names(layer: nn.Module) -> set[str]:
    """The names of the adapters that a PEFT layer holds."""
    names: set[str] = set()
    for attribute in layer.adapter_layer_names:
        holder = getattr(layer, attribute, None)
        if isinstance(holder, nn.ModuleDict | nn.ParameterDict):
            names.update(holder.keys())
    return names


def check_inputs(call: Call) -> None:
    """Refuse inputs that were computed from what is trained: the reference would be run on them too.

    Raises:
        SettingsError: with the name of the input.
    """
    for name, tensor in call.tensors():
        if tensor.grad_fn is not None:
            raise SettingsError(
                f"{name} was computed with gradients before the model was called, so what is trained may be in the "
                "reference too: give the model its own inputs (input_ids, pixel_values), or compute it under no_grad"
            )
