"""`safelora-fast env`: what is installed here and what serves it, to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import typer

from safelora_fast import _core

PACKAGES = (
    "safelora-fast", "numpy", "safetensors", "huggingface_hub", "torch", "triton", "transformers", "peft", "trl", "accelerate",
)  # fmt: skip


def env() -> None:
    """Print versions, CPU features, the kernels chosen and GPUs, as a block to paste into a bug report."""
    rows = [(name, _version(name)) for name in PACKAGES]
    rows += [
        ("python", f"{platform.python_implementation()} {platform.python_version()}"),
        ("system", platform.platform()),
        ("cpu", f"{_cpu_name()}, {os.cpu_count()} cores"),
        ("cpu features", " ".join(name for name, there in _core.cpu_features().items() if there) or "none looked for"),
        ("cpu kernels", _core.kernel_level()),
        ("threads", str(_core.default_threads())),
        ("gpu", _gpus()),
    ]
    rows += [(name, os.environ[name]) for name in sorted(os.environ) if name.startswith("SAFELORA_FAST_")]
    width = max(len(name) for name, _ in rows)
    typer.echo("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> str:
    """GPU names as the NVIDIA driver lists them, without importing torch."""
    found = []
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = information.read_text(encoding="utf-8").splitlines()
        found += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return ", ".join(found) or "none found; the projection runs on the CPU"
