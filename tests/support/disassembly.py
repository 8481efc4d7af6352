"""Compiles the CUDA sources with NVRTC without a GPU, and reads registers, stack and instructions of every kernel."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from safelora_fast import _core
from safelora_fast.errors import BackendError
from safelora_fast.ops import cuda_runtime

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: its registers, stack bytes, and the count of each instruction (such as "LDG.E.128")."""

    registers: int
    stack: int
    instructions: Counter[str]

    def count(self, start: str, *parts: str) -> int:
        """Count the instructions named `start` that have all `parts` among their suffixes."""
        named = ((name.split("."), times) for name, times in self.instructions.items())
        return sum(times for name, times in named if name[0] == start and set(parts) <= set(name))


@functools.cache
def kernels(source: str, architecture: str) -> dict[str, Kernel]:
    """Return the kernels of a source by name. Skip the test if NVRTC or a disassembler is not installed."""
    try:
        cubin = _core.cuda_kernels(source, architecture, nvrtc=cuda_runtime.nvrtc_candidates())
    except BackendError as error:
        if "was not found" not in str(error):
            raise
        pytest.skip(str(error))
    usage = _run("cuobjdump", ["-res-usage"], cubin)
    code = _run("cuobjdump", ["-sass"], cubin)
    found = {}
    for name, registers, stack in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", usage):
        body = code.split(f"Function : {name}\n")[1].split("Function : ")[0]
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", body)
        found[name] = Kernel(int(registers), int(stack), Counter(instructions))
    return found


def _run(tool: str, options: list[str], cubin: bytes) -> str:
    path = _find(tool)
    # cuobjdump runs nvdisasm, which it searches on the path.
    environment = {"PATH": f"{Path(path).parent}:/usr/bin:/bin"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [path, *options, file.name]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def _find(tool: str) -> str:
    """Find a CUDA tool in Triton's package or on the path."""
    spec = importlib.util.find_spec("triton")
    places = [Path(spec.origin).parent / "backends" / "nvidia" / "bin"] if spec and spec.origin else []
    found = next((str(place / tool) for place in places if (place / tool).is_file()), None) or shutil.which(tool)
    if found is None:
        pytest.skip(f"{tool} is neither on the path nor in the package of Triton")
    return found
