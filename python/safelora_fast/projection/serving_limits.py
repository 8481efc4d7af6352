"""What servers refuse, or compute differently, of an adapter: read from the sources of vLLM 0.33.0 and SGLang 0.5.23.

These adapters can be projected, and PEFT loads them. What cannot be projected (DoRA, PiSSA-like initializations, aLoRA)
is refused anyway. Which modules a server supports depends on the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.projection.copied_tensors import bypassing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from safelora_fast.checkpoints.adapter import Adapter

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank
DEFAULT_RANK = 16


def serving_notes(adapter: Adapter, copied: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return at most one warning for each server: what it refuses, ignores, or needs an option for."""
    ranks = [module.rank for module in adapter.modules if module.kind != "parameter"]
    largest = max(ranks, default=0)
    beside = [str(item["tensor"]) for item in bypassing(copied)]
    both = [f"refuses or ignores what was trained beside the LoRA factors ({beside[0]})"] if beside else []
    found = {"vLLM": [*both, *_by_vllm(largest)], "SGLang": [*both, *_by_sglang(adapter.config, ranks)]}
    return [f"{server} {'; it '.join(why)}" for server, why in found.items() if why]


def _by_vllm(largest: int) -> Iterator[str]:
    if largest > RANKS[-1]:
        yield f"does not serve rank {largest}, only up to {RANKS[-1]}"
    elif largest > DEFAULT_RANK:
        fitting = next(rank for rank in RANKS if rank >= largest)
        yield f"serves rank {largest} with --max-lora-rank {fitting} only"


def _by_sglang(config: Mapping[str, Any], ranks: Sequence[int]) -> Iterator[str]:
    if isinstance(pattern := config.get("target_modules"), str) and pattern not in {"all-linear", "all"}:
        yield "needs --lora-target-modules, since target_modules is a pattern"
    if config.get("use_rslora"):
        yield "scales by lora_alpha/r, though this adapter is rank-stabilized: its answers would be others"
    elif config.get("alpha_pattern") or any(rank != config.get("r") for rank in ranks):
        yield "scales every module by lora_alpha/r, though rank_pattern or alpha_pattern differ: its answers would be others"
