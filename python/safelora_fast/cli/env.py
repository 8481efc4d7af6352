"""`safelora-fast env`: versions, hardware and backends, to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Annotated

import typer

from safelora_fast import _core
from safelora_fast.errors import MissingDependencyError

PACKAGES = (
    "safelora-fast", "numpy", "safetensors", "huggingface_hub", "torch", "triton", "transformers", "peft", "trl", "accelerate",
    "inspect-ai",
)  # fmt: skip


def env(
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test", metavar="", help="Also check each available backend against float64 on small inputs."
        ),
    ] = False,
) -> None:
    """Print versions, CPU features, GPUs and the backend of each operation, to paste into a bug report.

    With --self-test, the exit code is 1 if the error of a backend exceeds its tolerance.
    """
    rows = [(name, _version(name)) for name in PACKAGES]
    rows += [
        ("python", f"{platform.python_implementation()} {platform.python_version()}"),
        ("system", platform.platform()),
        ("cpu", f"{cpu_name()}, {os.cpu_count()} cores, {cpu_caches()}"),
        ("cpu features", " ".join(name for name, there in _core.cpu_features().items() if there) or "none detected"),
        ("cpu kernels", _core.kernel_level()),
        ("threads", str(_core.default_threads())),
        ("gpu", _gpus()),
    ]
    rows += _backends()
    rows += [(name, os.environ[name]) for name in sorted(os.environ) if name.startswith("SAFELORA_FAST_")]
    width = max(len(name) for name, _ in rows)
    typer.echo("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    if self_test and not _self_test():
        raise typer.Exit(1)


def _backends() -> list[tuple[str, str]]:
    """Describe the backends of each operation on tensors."""
    if importlib.util.find_spec("torch") is None:
        return [("operations", "none on tensors: torch is not installed (projecting files does not need it)")]
    from safelora_fast.ops import OPS

    return [(op.name, op.describe()) for op in OPS]


def _self_test() -> bool:
    """Print the error and the tolerance of each backend. Return whether all errors are within tolerance."""
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError("env: --self-test needs torch: pip install torch")
    from safelora_fast.ops.self_test import run_checks

    passed = True
    typer.echo("\nself-test: largest relative error against float64, and what it may be")
    for check in run_checks():
        dtype = str(check.dtype).removeprefix("torch.")
        where = f"{check.operation:<20}  {check.backend:<7}  {check.device!s:<5}  {dtype:<8}"
        verdict = "ok" if check.passed else f"FAILED {check.failure or ''}".rstrip()
        typer.echo(f"{where}  {check.error:8.1e}  {check.tolerance:.0e}  {verdict}")
        passed = passed and check.passed
    return passed


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """Return the CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cpu_caches() -> str:
    """Return the caches of the first CPU as Linux lists them, e.g. `L1d 48K, L2 1024K, L3 32768K`."""
    found = []
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / name).read_text(encoding="utf-8").strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {size}")
    return ", ".join(found) or "cache sizes unknown"


def _gpus() -> str:
    """Return GPU names as the NVIDIA driver lists them, without importing torch."""
    found = []
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = information.read_text(encoding="utf-8").splitlines()
        found += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return ", ".join(found) or "none found; the projection runs on the CPU"
