"""`python benches/gpu`: every GPU kernel relative to a copy measured in the same run, next to its peers and aims.

Needs an installed wheel and torch on a GPU, builds nothing, and takes minutes. `--record` writes the table to
benches/results/. Peers' float32 products are true float32: tf32 is off. The aims are for an H100 or H200, and are
checked on no other GPU.
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
import torch
import triton
from timing import Timer

import projection
from safelora_fast.ops import OPS
from safelora_fast.ops.base import VARIABLE, gpu

RESULTS = Path(__file__).parents[1] / "results"
SUITES = {"projection": projection, "feature_distance": feature_distance, "linear_kl": linear_kl}
AIMED_AT = ("H100", "H200")


def use(backend: str | None) -> None:
    """Make one backend serve from now on; None: the default."""
    os.environ.pop(VARIABLE, None)
    if backend is not None:
        os.environ[VARIABLE] = backend


def available(operation: str) -> list[str]:
    """Return the GPU backends of an operation that run here."""
    (op,) = (op for op in OPS if op.name == operation)
    return [name for name in ("triton", "cuda") if name in op.names and op.backend(name).unsupported_reason(()) is None]


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
        "safelora-fast": version("safelora-fast"),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print("Times exclude the host's launches, except where the last column says otherwise.")
    is_judged = any(name in where["gpu"] for name in AIMED_AT)
    rows = []
    for suite, module in SUITES.items():
        operation = "subspace_projection" if suite == "projection" else suite
        for figure in module.figures(timer, available(operation), use):
            row = {
                "suite": suite,
                "provider": figure.provider,
                "part": figure.part,
                "figure": figure.name,
                "value": f"{figure.value:.4g}",
                "aim": figure.aim,
                "reached": figure.reached if is_judged else "",
                "host": figure.host,
            }
            rows.append({**row, **where})
            print("  ".join(f"{row[name]:<{width}}" for name, width in WIDTHS.items()).rstrip(), flush=True)
        torch.cuda.empty_cache()
    if is_judged:
        judged = [row["reached"] for row in rows if row["reached"]]
        print(f"{judged.count('yes')} of {len(judged)} aims reached")
    if "--record" in sys.argv:
        path = RESULTS / f"gpu-{where['date']}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(path)
    return 0


WIDTHS = {"suite": 16, "provider": 16, "part": 34, "figure": 20, "value": 8, "aim": 7, "reached": 3, "host": 8}


if __name__ == "__main__":
    raise SystemExit(main())
