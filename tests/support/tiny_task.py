"""A tiny lm-evaluation-harness benchmark: sixteen questions with two choices each."""

from __future__ import annotations

import json
import random
import string
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pathlib import Path

NAME = "tiny_choice"


def write_task(folder: Path) -> dict[str, Any]:
    """Write the benchmark, and return the `tasks:` section that selects it."""
    draw = random.Random(3)
    rows = [
        {
            "question": f"{n}?",
            "choices": ["".join(draw.sample(string.ascii_lowercase, 5)) for _ in range(2)],
            "answer": n % 2,
        }
        for n in range(16)
    ]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    task = {
        "task": NAME, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "choice.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
        "doc_to_target": "answer", "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "tasks" / f"{NAME}.yaml").write_text(yaml.safe_dump(task))
    return {"names": [NAME], "path": str(folder / "tasks")}
