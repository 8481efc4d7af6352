"""A recipe around a tiny model, with short rows: a run takes a second or two."""

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
        output: the folder that the run makes.
    """

    path: Path
    model: Path
    data: Path
    output: Path

    def words(self, *words: object) -> list[str]:
        """The arguments of `train`."""
        return ["train", str(self.path), *map(str, words)]

    def edit(self, **sections: Any) -> None:
        """Put sections on top of the file."""
        values = yaml.safe_load(self.path.read_text())
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
        self.path.write_text(yaml.safe_dump(values, sort_keys=False))

    def weights(self, folder: Path | None = None) -> dict[str, torch.Tensor]:
        """The adapter that a run wrote."""
        return load_file((folder or self.output) / "adapter_model.safetensors")

    def record(self) -> dict[str, Any]:
        """The record that a run wrote."""
        return json.loads((self.output / "safelora_train.json").read_text())

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that are there."""
        return sorted(int(path.name.partition("-")[2]) for path in (self.output / "checkpoints").glob("checkpoint-*"))


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_rows(count: int = 12) -> list[dict[str, Any]]:
    """Rows of unequal length."""
    return [{"prompt": f"{number}?", "completion": WORDS[number % len(WORDS)]} for number in range(count)]


def write_recipe(folder: Path, *, seed: int = 0, **sections: Any) -> TinyRecipe:
    """A recipe of 6 steps: 12 rows, two epochs, 2 × 2 rows a step; a checkpoint after every second."""
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
