"""`python benches/gpu`: every GPU kernel as a fraction of a copy measured in the same run, beside its peers.

Needs an installed wheel and torch on a GPU, builds nothing, and takes minutes; `--record` keeps the table under
benches/results/. float32 products of peers are true float32: tf32 is off.
"""

from __future__ import annotations

import csv
import datetime
import os
import sys
from importlib.metadata import version
from pathlib import Path

import feature_distance
import linear_kl
import projection
import torch
from timing import Timer

from safelora_fast.ops import backends
from safelora_fast.ops.triton_runtime import gpu

RESULTS = Path(__file__).parents[1] / "results"
SUITES = {"projection": projection, "feature_distance": feature_distance, "linear_kl": linear_kl}


def use(backend: str | None) -> None:
    """Have one backend serve from now on; None: the default."""
    os.environ.pop(backends.VARIABLE, None)
    if backend is not None:
        os.environ[backends.VARIABLE] = backend


def available(operation: str) -> list[str]:
    """The GPU backends of an operation that run here."""
    names = [name for name in ("triton", "cuda") if backends.has_form(operation, name)]
    return [name for name in names if backends.form(operation, name).refusal(()) is None]


def main() -> int:
    device = gpu()
    if device is None or device.type != "cuda":
        print("no GPU that torch.cuda can use: nothing to measure", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    timer = Timer.on(device)
    where = {
        "gpu": torch.cuda.get_device_name(device),
        "copy_gb_s": round(timer.copy_bytes_per_ms / 1e6),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        **{name: version(name) for name in ("safelora-fast", "torch", "triton")},
    }
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    rows = []
    for suite, module in SUITES.items():
        operation = "subspace_projections" if suite == "projection" else suite
        for row in module.rows(timer, available(operation), use):
            rows.append({"suite": suite, **row, **where})
            figures = "  ".join(f"{name} {value:.3g}" for name, value in row.items() if isinstance(value, float))
            print(f"{suite:<17} {row['provider']:<24} {row['pass']:<24} {figures}", flush=True)
        torch.cuda.empty_cache()
    if "--record" in sys.argv:
        path = RESULTS / f"gpu-{where['date']}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
