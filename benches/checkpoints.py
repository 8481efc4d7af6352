"""Random checkpoints and adapters with the shapes of real models, written shard by shard without torch.

The weights come from one pool of normal values, read at seeded offsets, so a 7B pair is written at disk speed. The base
differs from the aligned model by a second, smaller draw in a tenth of the elements.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

POOL_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Shapes:
    """The sizes of a Qwen2.5 model that decide its tensors."""

    name: str
    hidden: int
    key_value: int
    intermediate: int
    layers: int
    vocabulary: int
    tied: bool
    shards: int

    def projections(self) -> dict[str, tuple[int, int]]:
        """The seven projections of a layer: module path -> (out, in)."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.key_value, self.hidden),
            "self_attn.v_proj": (self.key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the file."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (self.hidden,)
            for module, (rows, columns) in self.projections().items():
                yield f"{prefix}{module}.weight", (rows, columns)
                if module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                    yield f"{prefix}{module}.bias", (rows,)
            yield prefix + "post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)


QWEN_0_5B = Shapes("qwen2.5-0.5b", 896, 128, 4864, 24, 151_936, tied=True, shards=2)
QWEN_7B = Shapes("qwen2.5-7b", 3584, 512, 18_944, 28, 152_064, tied=False, shards=4)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the bfloat16 bits of float32 values, rounded to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], chunks: Iterator[np.ndarray]) -> None:
    """Write bfloat16 tensors; `chunks` yields their bytes in the order of `tensors`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for chunk in chunks:
            chunk.tofile(file)


def write_pair(folder: Path, shapes: Shapes, seed: int = 0) -> tuple[Path, Path]:
    """Write `folder/aligned` and `folder/base` unless they exist, and return both."""
    aligned, base = folder / "aligned", folder / "base"
    if (base / "complete").exists():
        return aligned, base
    generator = np.random.default_rng(seed)
    pool = generator.standard_normal(POOL_ELEMENTS, dtype=np.float32) * 0.02
    drift = np.where(generator.random(POOL_ELEMENTS, dtype=np.float32) < 0.1, 0.05 * np.roll(pool, 12_345), 0)
    tensors = dict(shapes.tensors())
    starts = {name: int(generator.integers(POOL_ELEMENTS)) for name in tensors}
    for target, bits in {aligned: bfloat16(pool + drift), base: bfloat16(pool)}.items():
        target.mkdir(parents=True, exist_ok=True)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(_shards(tensors, shapes.shards), start=1):
            file = f"model-{number:05}-of-{shapes.shards:05}.safetensors"
            write_safetensors(target / file, shard, _draw(bits, shard, starts))
            weight_map |= dict.fromkeys(shard, file)
        (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (target / "config.json").write_text(json.dumps({"model_type": "qwen2", "tie_word_embeddings": shapes.tied}))
    (base / "complete").touch()
    return aligned, base


def _shards(tensors: dict[str, tuple[int, ...]], count: int) -> list[dict[str, tuple[int, ...]]]:
    """Split the tensors, in order, into `count` shards of about the same size."""
    sizes = np.cumsum([np.prod(shape) for shape in tensors.values()], dtype=np.int64)
    numbers = np.minimum((sizes - 1) * count // sizes[-1], count - 1)
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(count)]
    for number, (name, shape) in zip(numbers, tensors.items(), strict=True):
        shards[number][name] = shape
    return shards


def _draw(bits: np.ndarray, shard: dict[str, tuple[int, ...]], starts: dict[str, int]) -> Iterator[np.ndarray]:
    for name, shape in shard.items():
        start, left = starts[name], int(np.prod(shape))
        while left:
            piece = bits[start : start + left]
            yield piece
            left -= len(piece)
            start = 0


def write_adapter(folder: Path, shapes: Shapes, rank: int = 32, seed: int = 1) -> Path:
    """Write a PEFT adapter on all seven projections with random factors, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(shapes.layers):
        for module, (rows, columns) in shapes.projections().items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = (rank, columns)
            tensors[f"{prefix}.lora_B.weight"] = (rows, rank)
    draws = (bfloat16(generator.standard_normal(shape, dtype=np.float32) * 0.02) for shape in tensors.values())
    write_safetensors(folder / "adapter_model.safetensors", tensors, draws)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({module.rsplit(".", 1)[1] for module in shapes.projections()}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder
