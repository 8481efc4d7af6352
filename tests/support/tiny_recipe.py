"""A recipe with a tiny model and short examples; a run takes a second or two."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from demo_model import save_tiny
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

    import torch

WORDS = [
    "red",
    "blue and green",
    "a cat",
    "no",
    "seven",
    "in the west",
    "slowly",
    "tea",
    "at noon",
    "rope",
    "yes",
    "salt",
]


@dataclass(frozen=True)
class TinyRecipe:
    """A recipe on disk.

    Attributes:
        path: the YAML file.
        model: the model's folder.
        data: the JSONL file.
        output: the output folder of the run.
    """

    path: Path
    model: Path
    data: Path
    output: Path

    def words(self, *words: object) -> list[str]:
        """Return the arguments of the `train` command."""
        return ["train", str(self.path), *map(str, words)]

    def edit(self, **sections: Any) -> None:
        """Merge sections into the file."""
        values = yaml.safe_load(self.path.read_text())
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
        self.path.write_text(yaml.safe_dump(values, sort_keys=False))

    def weights(self, folder: Path | None = None) -> dict[str, torch.Tensor]:
        """Load the adapter that a run wrote."""
        return load_file((folder or self.output) / "adapter_model.safetensors")

    def record(self) -> dict[str, Any]:
        """Read the record that a run wrote."""
        return json.loads((self.output / "safelora_train.json").read_text())

    def checkpoints(self) -> list[int]:
        """Return the steps of the existing checkpoints."""
        return sorted(int(path.name.partition("-")[2]) for path in (self.output / "checkpoints").glob("checkpoint-*"))


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_rows(count: int = 12) -> list[dict[str, Any]]:
    """Return examples of unequal length."""
    return [{"prompt": f"{number}?", "completion": WORDS[number % len(WORDS)]} for number in range(count)]


def write_recipe(folder: Path, *, seed: int = 0, **sections: Any) -> TinyRecipe:
    """Write a recipe of 6 steps: 12 examples, 2 epochs, 2 × 2 examples per step, a checkpoint every 2 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    model = save_tiny(folder / "model", seed)
    data = write_rows(folder / "rows.jsonl", tiny_rows())
    values = {
        "model": {"path": str(model), "dtype": "float32", "device": "cpu"},
        "data": {"path": str(data)},
        "lora": {"r": 4, "lora_alpha": 8},
        "training": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_steps": 2,
            "save_total_limit": None,
        },
        "defenses": {"kl": {"weight": 0.5}},
        "output": {"folder": str(folder / "out")},
    }
    recipe = TinyRecipe(folder / "recipe.yaml", model, data, folder / "out")
    recipe.path.write_text(yaml.safe_dump(values, sort_keys=False))
    recipe.edit(**sections)
    return recipe


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)
