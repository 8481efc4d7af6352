"""Two checkpoints and adapters written with numpy alone: a Llama with random weights in two shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = {"self_attn.q_proj": (24, 16), "self_attn.v_proj": (8, 16), "mlp.down_proj": (16, 40)}
RANK = 4


@dataclass(frozen=True)
class Pair:
    """The folders of the checkpoints, the adapter and the output."""

    aligned: Path
    base: Path
    adapter: Path
    output: Path

    def command(self, *arguments: object, output: bool = True) -> list[str]:
        """Return the arguments of the `project` command."""
        words = ["project", self.adapter, "--aligned", self.aligned, "--base", self.base]
        return [str(word) for word in [*words, *(["--output", self.output] if output else []), *arguments]]

    def shard(self, role: str, number: int = 1) -> Path:
        return getattr(self, role) / f"model-{number:05d}-of-00002.safetensors"


def module_names(layers: int = 2) -> list[str]:
    return [f"model.layers.{layer}.{name}" for layer in range(layers) for name in SHAPES]


def drawn(random: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Return normal values. They repeat in large matrices, because drawing them all would take a minute."""
    values = random.standard_normal(min(rows * cols, 999_983))
    return np.resize(values, (rows, cols))


def write_model(folder: Path, seed: int, *, scale: int = 1, layers: int = 2, dtype: str = "float32") -> Path:
    """Write a model in two shards with an index: one layer in the first shard, the others in the second.

    All seeds share common weights, so that two models differ by a tenth of their weights.
    """
    folder.mkdir(parents=True)
    common, random = np.random.default_rng(0), np.random.default_rng(seed)
    places: dict[str, str] = {}
    shards: dict[str, dict[str, np.ndarray]] = {}
    for name in module_names(layers):
        rows, cols = (scale * size for size in SHAPES[name.split(".", 3)[3]])
        shard = f"model-0000{1 if '.0.' in name else 2}-of-00002.safetensors"
        weight = ((drawn(common, rows, cols) + drawn(random, rows, cols) / 10) / 8).astype(dtype)
        shards.setdefault(shard, {})[f"{name}.weight"] = weight
        places[f"{name}.weight"] = shard
    shards["model-00001-of-00002.safetensors"]["model.norm.weight"] = np.ones(16, dtype)
    places["model.norm.weight"] = "model-00001-of-00002.safetensors"
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def write_adapter(folder: Path, seed: int, *, scale: int = 1, layers: int = 2, rank: int = RANK) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    factors = {}
    for name in module_names(layers):
        rows, cols = (scale * size for size in SHAPES[name.split(".", 3)[3]])
        key = f"base_model.model.{name}"
        factors[f"{key}.lora_A.weight"] = random.standard_normal((rank, cols), dtype=np.float32)
        factors[f"{key}.lora_B.weight"] = random.standard_normal((rows, rank), dtype=np.float32)
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt", "note": "kept"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": [*SHAPES], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_pair(folder: Path, **options) -> Pair:
    return Pair(
        write_model(folder / "aligned", 1, **options),
        write_model(folder / "base", 2, **options),
        write_adapter(folder / "adapter", 3, **{key: options[key] for key in ("scale", "layers") if key in options}),
        folder / "out" / "safe",
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file under a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def start(arguments: list[str], **options) -> subprocess.Popen[str]:
    """Start the command line in a separate process."""
    command = [sys.executable, "-m", "safelora_fast", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "100", **options.pop("env", {})}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def run(arguments: list[str], **options) -> tuple[int, str, str]:
    """Run the command line; return exit code, standard output and standard error."""
    process = start(arguments, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err
