"""A comparison of tiny models whose runs train inside this process, which takes seconds instead of a minute."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from demo_model import save_tiny
from tiny_recipe import tiny_rows, write_rows

from safelora_fast.compare import train_runs
from safelora_fast.errors import SafeLoraFastError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class TinyComparison:
    """A comparison configuration on disk.

    Attributes:
        path: the YAML file.
        output: its output folder.
    """

    path: Path
    output: Path

    def words(self, *words: object) -> list[str]:
        """Return the arguments of the `compare` command."""
        return ["compare", str(self.path), *map(str, words)]

    def values(self) -> dict[str, Any]:
        """Read the configuration."""
        return yaml.safe_load(self.path.read_text())

    def edit(self, **sections: Any) -> None:
        """Replace sections of the file."""
        self.path.write_text(yaml.safe_dump({**self.values(), **sections}, sort_keys=False))

    def report(self) -> dict[str, Any]:
        """Read the report of the comparison."""
        return json.loads((self.output / "report.json").read_text())

    def cells(self, run: str) -> dict[str, Any]:
        """Return the cells of a run's row in the report."""
        return next(row for row in self.report()["rows"] if row["name"] == run)["cells"]


def write_comparison(folder: Path, **sections: Any) -> TinyComparison:
    """Write a comparison: two runs of three steps with two seeds; margin, drift, thresholds and operator swap."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("model", "base")):
        save_tiny(folder / name, seed)
    rows = {name: str(write_rows(folder / f"{name}.jsonl", tiny_rows(count))) for name, count in COUNTS.items()}
    values = {
        "title": "Two runs",
        "recipe": {
            "model": {"path": str(folder / "model"), "dtype": "float32", "device": "cpu"},
            "data": {"path": rows["train"]},
            "lora": {"r": 4, "lora_alpha": 8},
            "training": {
                "max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 0.01,
                "save_strategy": "no",
            },
        },
        "seeds": [0, 1],
        "runs": {"none": {}, "KL": {"defenses": {"kl": {"weight": 3.0}}}},
        "measure": {
            "narrow": rows["narrow"], "general": rows["general"], "scaled": [0.5], "device": "cpu",
            "operator_swap": {"rows": 8, "held_out": 6, "seeds": [0]},
            "sweep": {"base": str(folder / "base"), "thresholds": [-1.0, 1.0]},
        },
        "output": str(folder / "out"),
    }  # fmt: skip
    comparison = TinyComparison(folder / "compare.yaml", folder / "out")
    comparison.path.write_text(yaml.safe_dump({**values, **sections}, sort_keys=False))
    return comparison


def copy_comparison(made: TinyComparison, folder: Path) -> TinyComparison:
    """Copy a finished comparison to another folder, as if it had been created there."""
    copy = TinyComparison(folder / "compare.yaml", folder / "out")
    shutil.copytree(made.output, copy.output)
    copy.path.write_text(made.path.read_text())
    copy.edit(output=str(copy.output))
    return copy


COUNTS = {"train": 12, "narrow": 6, "general": 5}


def train_inside(monkeypatch: Any) -> list[str]:
    """Make comparisons train in this process. Return the list of trained recipes, which grows with each run."""
    trained: list[str] = []

    def run(command: list[str], *, talk: bool) -> str | None:
        del talk
        from safelora_fast.recipe.prepare import prepare
        from safelora_fast.recipe.recipe import load_recipe
        from safelora_fast.recipe.run import train

        *_, recipe, how = command
        trained.append(recipe)
        try:
            train(prepare(load_recipe(recipe)), resume=how == "--resume", command="", talk=False)
        except SafeLoraFastError as error:
            return str(error)
        return None

    monkeypatch.setattr(train_runs, "_run", run)
    return trained
