"""Finding the parts of a causal language model: the decoder, its layers, the output head, and the PEFT layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from safelora_fast.errors import SettingsError

STREAMS = ("altup_num_inputs", "hc_mult", "hc_count")  # Gemma 3n; DeepSeek-V4, GLM-5 and HY-V4; Qwen 4


@dataclass(frozen=True)
class Head:
    """The output head: logits = softcap(scale * (hidden @ weight.T + bias))."""

    module: nn.Module
    scale: float
    softcap: float | None

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight [vocabulary, hidden] and bias [vocabulary] or None; sharded parameters are gathered."""
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        return gathered(weight), None if bias is None else gathered(bias)


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal language model that defenses use."""

    model: nn.Module
    decoder: nn.Module
    layers: tuple[nn.Module, ...]
    config: Any

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The layers, under their name in version 0.1.0."""
        return self.layers

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def layer(self, index: int, *, owner: str) -> int:
        """Check a layer index (negative values count from the end) and return it as a non-negative number."""
        if not -self.depth <= index < self.depth:
            raise SettingsError(f"{owner}: layer {index} does not exist, the model has {self.depth} layers")
        self.check_outputs(owner=owner)
        return index % self.depth

    def check_outputs(self, *, owner: str) -> None:
        """Refuse a model whose layers have several hidden states per token, because the choice of one is undefined.

        Raises:
            SettingsError: the model has several; the message names the configuration key.
        """
        for name in STREAMS:
            if (count := getattr(self.config, name, None)) is not None:
                raise SettingsError(
                    f"{owner}: the layers of {type(self.model).__name__} give {count} hidden states for each token "
                    f"({name}), and which one is meant is not defined; KL does not look at layers"
                )

    def head(self) -> Head:
        """Return the output head with the scale and soft-cap from the model's configuration.

        Raises:
            SettingsError: the model has no linear head.
        """
        module = self.model.get_output_embeddings()
        if module is None or getattr(module, "weight", None) is None or module.weight.dim() != 2:
            raise SettingsError(f"KL: {type(self.model).__name__} has no linear output head")
        return Head(module, logit_scale(self.config), logit_softcap(self.config))


def gathered(parameter: torch.Tensor) -> torch.Tensor:
    """Return the full tensor of a parameter that FSDP2 may have sharded."""
    full_tensor = getattr(parameter, "full_tensor", None)
    return parameter if full_tensor is None else full_tensor()


def logit_softcap(config: Any) -> float | None:
    """Return the soft-cap of the logits (Gemma 2, RecurrentGemma, xLSTM), or None."""
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    return None


def logit_scale(config: Any) -> float:
    """Return the factor that the model applies to its logits (Cohere, Granite, Falcon-H1 and others)."""
    if config.model_type == "mpt":  # the model ignores the key
        return 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def is_parallel(model: nn.Module) -> bool:
    """Return whether the model wraps another one, its `module`, for data-parallel training."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    return isinstance(model, nn.parallel.DistributedDataParallel) or "DeepSpeedEngine" in kinds


def without_parallel(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel or DeepSpeed's engine."""
    while is_parallel(model):
        model = model.module
    return model


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """Return the configurations of a PEFT model's adapters by name; empty without PEFT."""
    return dict(getattr(without_parallel(model), "peft_config", None) or {})


def unwrap(model: nn.Module) -> nn.Module:
    """Remove the wrappers of DistributedDataParallel, DeepSpeed's engine and PEFT.

    Raises:
        SettingsError: the model is wrapped in DataParallel or FSDP version 1, or compiled.
    """
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if isinstance(model, nn.DataParallel):
        raise SettingsError(
            "DataParallel replicates the model and drops its hooks: start one process per device "
            "(torchrun or accelerate launch), or show one device with CUDA_VISIBLE_DEVICES"
        )
    if "FullyShardedDataParallel" in kinds:
        raise SettingsError(
            "FullyShardedDataParallel flattens the parameters that the defenses act on: use its second version, "
            "fully_shard (fsdp_version 2)"
        )
    if is_parallel(model):
        return unwrap(without_parallel(model))
    if hasattr(model, "_orig_mod"):
        raise SettingsError(
            "torch.compile(model) wraps the model and hides the modules that the defenses hook: compile it in place, "
            "model.compile()"
        )
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def dissect(model: nn.Module) -> Anatomy:
    """Find the decoder, layers and configuration of a causal language model, through its wrappers.

    Raises:
        SettingsError: the model is in DataParallel, compiled or an encoder-decoder, or its layers cannot be found.
    """
    inner = unwrap(model)
    kind = type(inner).__name__
    config = getattr(inner, "config", None)
    if config is None or not hasattr(inner, "get_output_embeddings"):
        raise SettingsError(f"{kind} is not a causal language model of transformers")
    text = config.get_text_config()
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, text)):
        raise SettingsError(f"{kind} is an encoder-decoder: defenses are for decoder-only language models")
    for decoder in _decoders(inner):
        for module in decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == text.num_hidden_layers:
                return Anatomy(inner, decoder, tuple(module), text)
    raise SettingsError(f"{kind}: no list of {text.num_hidden_layers} decoder layers found")


def _decoders(model: nn.Module) -> list[nn.Module]:
    """Return the modules that may contain the layers: the model's named decoder, its base model, then its parts.

    Before transformers 5, GPT-2 and Falcon have only a base model. Llama 4 names a base model that does not exist, and
    ModernBERT's decoder is its output head. BLIP-2 and Kosmos-2 name a language model with its head, which returns
    logits.
    """
    named = [model.get_decoder()] if hasattr(model, "get_decoder") else []
    parts = [child for child in model.children() if hasattr(child, "config")]
    found: list[nn.Module] = []
    for decoder in (*named, model.base_model, *parts):
        if decoder is not model:
            found.extend(_decoders(decoder) if _has_head(decoder) else [decoder])
    return found


def _has_head(module: nn.Module) -> bool:
    head = getattr(module, "get_output_embeddings", None)
    return head is not None and head() is not None


def entrances(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are called with the causal language model's arguments: the model and PEFT's tuner.

    PEFT before 0.20 calls the model's `forward` from the tuner, so hooks on the model do not run.
    """
    inner = unwrap(model)
    return [module for module in model.modules() if module is inner or module._modules.get("model") is inner]


def above(model: nn.Module, part: nn.Module) -> list[nn.Module]:
    """Return the modules that contain a part of the model, starting with the model."""
    name = next(name for name, module in model.named_modules() if module is part)
    steps = name.split(".")
    return [model.get_submodule(".".join(steps[:count])) for count in range(len(steps))]


def adapter_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, layer) of every PEFT tuner layer and other module that PEFT trains; empty without PEFT."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import AuxiliaryTrainingWrapper
    except ImportError:
        return []
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
