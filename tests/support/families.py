"""Tiny random models of many families, PEFT adapters for them, and a dense float64 oracle of their projection."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper
from safetensors.torch import load_file, save_file

from safelora_fast import _core
from safelora_fast.checkpoints.adapter import load_adapter
from safelora_fast.checkpoints.sources import open_checkpoint
from safelora_fast.projection.plan import plan_projection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from safelora_fast.projection.jobs import Plan

COMMON = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROJECTIONS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Family:
    """A model family: its configuration, and the usual target modules of an adapter."""

    config: type[transformers.PretrainedConfig]
    modules: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    common: bool = True
    lora: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> dict[str, Any]:
        """Settings of an adapter that adapts every kind of weight in the layers."""
        return {"target_modules": self.modules, "target_parameters": self.experts or None, **self.lora}

    @cached_property
    def experts(self) -> list[str]:
        """Names of the experts' stacked weights; empty before transformers 5, where each expert is a separate module."""
        names = [name for name, _ in self.make(seed=0).named_parameters()] if self.parameters else []
        return [parameter for parameter in self.parameters if any(name.endswith(parameter) for name in names)]

    def make(self, seed: int, **settings: Any) -> transformers.PreTrainedModel:
        """Create a model with random weights, including the biases."""
        common = COMMON if self.common else {}
        config = self.config(**{**common, **self.settings, **settings})
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
        return model


_NAMES = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 40}
FAMILIES = {
    "llama": Family(transformers.LlamaConfig, PROJECTIONS),
    "qwen2": Family(transformers.Qwen2Config, PROJECTIONS),
    "mistral": Family(transformers.MistralConfig, PROJECTIONS),
    "gemma": Family(transformers.GemmaConfig, PROJECTIONS, {"head_dim": 8}),
    "phi3": Family(transformers.Phi3Config, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "opt": Family(
        transformers.OPTConfig,
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        {"ffn_dim": 24, "word_embed_proj_dim": 32},
    ),
    "gpt2": Family(
        transformers.GPT2Config,
        ["c_attn", "c_proj", "c_fc"],
        {**_NAMES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        common=False,
        lora={"fan_in_fan_out": True},
    ),
    "falcon": Family(
        transformers.FalconConfig,
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        {**_NAMES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        common=False,
    ),
    "mixtral": Family(transformers.MixtralConfig, ATTENTION, {"num_local_experts": 3}, EXPERTS),
    "qwen2_moe": Family(
        transformers.Qwen2MoeConfig,
        [*ATTENTION, "shared_expert.gate_proj"],
        {
            "num_experts": 3,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "num_experts_per_tok": 2,
        },
        EXPERTS,
    ),
    "gpt_oss": Family(
        transformers.GptOssConfig,
        ATTENTION,
        {"num_local_experts": 3, "head_dim": 8, "num_experts_per_tok": 2, "max_position_embeddings": 4096 * 32},
        EXPERTS,
    ),
}


def save(model: torch.nn.Module, folder: Path) -> Path:
    """Save the model, and return the folder."""
    model.save_pretrained(folder)
    return folder


def rewrite(
    folder: Path,
    output: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
    config: dict[str, Any] | None = None,
    file: str = "model.safetensors",
) -> Path:
    """Copy a checkpoint or adapter with changed tensors and configuration."""
    output.mkdir(parents=True)
    tensors = {name: tensor.clone().contiguous() for name, tensor in change(load_file(folder / file)).items()}
    save_file(tensors, output / file, {"format": "pt"})
    name = "adapter_config.json" if file == "adapter_model.safetensors" else "config.json"
    settings = json.loads((folder / name).read_text())
    settings.update(config or {})
    (output / name).write_text(json.dumps(settings))
    return output


def adapt(model: transformers.PreTrainedModel, *, seed: int = 7, name: str = "default", **config: Any) -> PeftModel:
    """Add a LoRA adapter with random lora_A and lora_B."""
    peft_model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **config}), adapter_name=name)
    randomize(peft_model, seed)
    return peft_model


def randomize(peft_model: PeftModel, seed: int) -> None:
    """Fill every trainable tensor with random values, so that no update is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def updates(peft_model: PeftModel, name: str = "default") -> dict[str, torch.Tensor]:
    """Return PEFT's own ΔW of every module and every expert, float64 [out, in]."""
    return {key: delta for key, (delta, _) in _adapted(peft_model, name).items()}


def weights(peft_model: PeftModel, name: str = "default") -> dict[str, torch.Tensor]:
    """Return the frozen weight of every adapted module and expert, float64 [out, in]."""
    return {key: weight for key, (_, weight) in _adapted(peft_model, name).items()}


def _adapted(peft_model: PeftModel, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for place, module in peft_model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer) or name not in {**module.lora_A, **module.lora_embedding_A}:
            continue
        key = place.replace(".base_layer", "")
        with torch.no_grad():
            delta = module.get_delta_weight(name).double()
        if isinstance(module, ParamWrapper):
            weight = module.get_param().detach().double()
            if not module._did_swap_in_out_features and weight.dim() == 3:
                delta, weight = delta.transpose(1, 2), weight.transpose(1, 2)
            if weight.dim() == 2:
                found[f"{key}.{module.parameter_name}"] = delta, weight
                continue
            for expert in range(len(weight)):
                found[f"{key}.{expert}.{module.parameter_name}"] = delta[expert], weight[expert]
        else:
            weight = module.get_base_layer().weight.detach().double()
            if isinstance(module, Embedding) or module.fan_in_fan_out:
                delta, weight = delta.T, weight.T
            found[key] = delta, weight
    return found


@dataclass(frozen=True)
class Projected:
    """Result of projecting every module of one adapter: its folder, and the cosine and ‖V‖_F of each module."""

    folder: Path
    plan: Plan
    cosines: dict[str, float]
    norms: dict[str, float]


def project(adapters: list[Path], aligned: Path, base: Path, output: Path) -> list[Projected]:
    """Plan and run the projection, and write every projected lora_B to its place in the adapter's tensors."""
    loaded = [load_adapter(adapter) for adapter in adapters]
    plan = plan_projection(loaded, open_checkpoint(aligned, role="aligned"), open_checkpoint(base, role="base"))
    tensors = [load_file(adapter / "adapter_model.safetensors") for adapter in adapters]
    cosines: list[dict[str, float]] = [{} for _ in adapters]
    norms: list[dict[str, float]] = [{} for _ in adapters]
    stream = _core.ProjectionStream([module.job for module in plan.modules], _core.Operator.frobenius(), threads=2)
    for module, outcome in zip(plan.modules, stream, strict=True):
        for met, factors in zip(module.group.factors, outcome.factors, strict=True):
            target = met.lora_b
            tensor = tensors[met.adapter][target.key]
            place = tensor.as_strided((target.rows, target.cols), (target.row_stride, target.col_stride), target.offset)
            block = torch.frombuffer(bytearray(factors.projected()), dtype=tensor.dtype)
            place.copy_(block.reshape(target.rows, target.cols))
            cosines[met.adapter][module.name] = factors.cosine
            norms[met.adapter][module.name] = outcome.v_norm
    results = []
    for index, adapter in enumerate(adapters):
        folder = output / f"{index}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
        save_file(tensors[index], folder / "adapter_model.safetensors", {"format": "pt"})
        results.append(Projected(folder, plan, cosines[index], norms[index]))
    return results


def check_projection(
    folder: Path,
    models: Sequence[torch.nn.Module],
    target: dict[str, Any],
    change: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> Projected:
    """Project an adapter of the first of two models, and check it with :func:`assert_projected`.

    Args:
        folder: an empty folder.
        models: the aligned model and the base model.
        target: settings of the adapter.
        change: functions that change the tensors of each checkpoint on disk.
    """
    folders = [save(model, folder / role) for model, role in zip(models, ("aligned", "base"), strict=True)]
    if change is not None:
        folders = [
            rewrite(each, folder / f"{each.name}-changed", how) for each, how in zip(folders, change, strict=True)
        ]
    base_weights, adapted = weights(adapt(models[1], **target)), adapt(models[0], **target)
    (result,) = project([save(adapted, folder / "adapter")], *folders, folder / "out")
    assert_projected(result, adapted, base_weights)
    return result


def assert_projected(
    result: Projected,
    peft_model: PeftModel,
    base_weights: dict[str, torch.Tensor],
    *,
    name: str = "default",
    tolerance: float = 1e-5,
) -> None:
    """Compare with C·ΔW, computed densely in float64 from the weights of PEFT and transformers in memory.

    PEFT loads the projected tensors into the same adapter, so this also checks names, orientation and layout.
    """
    peft_model.double()
    before, aligned = updates(peft_model, name), weights(peft_model, name)
    state = load_file(result.folder / "adapter_model.safetensors")
    assert not set_peft_model_state_dict(peft_model, state, adapter_name=name).unexpected_keys
    after = updates(peft_model, name)
    assert set(result.cosines) == set(before)
    for module, delta in before.items():
        difference = aligned[module] - base_weights[module]
        norm = difference.norm()
        truth = difference @ (difference.T @ delta) / norm
        cosine = (truth * delta).sum() / (truth.norm() * delta.norm())
        assert abs(result.norms[module] / norm - 1) < 1e-6, module
        assert abs(result.cosines[module] - cosine) < 1e-6, module
        assert (after[module] - truth).norm() / truth.norm() < tolerance, module
