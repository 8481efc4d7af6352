"""What an installed wheel must do on any machine: project an adapter, the same bits everywhere, and train where torch is.

It runs in an environment that has the package and no test tools: `python .ci/smoke_test.py [EXAMPLES]`.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import safelora_fast
from safelora_fast.errors import MissingDependencyError

MODULE = "model.layers.0.mlp.up_proj"
# Of the projected lora_B on every CPU and at every level of the kernels.
DIGEST = "23425beaf019f8bc"


def random(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """Return multiples of 1/64 between −1 and 1, which no platform rounds."""
    return (generator.integers(-64, 65, shape) / 64).astype(np.float32)


def write_pair(folder: Path) -> None:
    """Write two checkpoints with one module of 96×80, and an adapter of rank 8."""
    generator = np.random.default_rng(0)
    base = random(generator, 96, 80)
    tensors = {
        "base/model": {f"{MODULE}.weight": base},
        "aligned/model": {f"{MODULE}.weight": base + random(generator, 96, 80) / 8},
        "adapter/adapter_model": {
            f"base_model.model.{MODULE}.lora_A.weight": random(generator, 8, 80),
            f"base_model.model.{MODULE}.lora_B.weight": random(generator, 96, 8),
        },
    }
    for name, content in tensors.items():
        (folder / name).parent.mkdir()
        save_file(content, folder / f"{name}.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["up_proj"], "bias": "none"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def run(*command: object, **variables: str) -> str:
    """Run a command; return its output, or end with its errors."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def check_projection(folder: Path, level: str) -> None:
    """Project by the command, and compare with the dense formula and with the digest."""
    program = Path(sys.executable).with_name("safelora-fast")
    output = folder / f"projected-{level or 'widest'}"
    pair = ("--aligned", folder / "aligned", "--base", folder / "base")
    run(
        program, "project", folder / "adapter", *pair, "--output", output, "--select", "all",
        SAFELORA_FAST_CPU_LEVEL=level,
    )  # fmt: skip
    key = f"base_model.model.{MODULE}.lora_B.weight"
    written = load_file(output / "adapter_model.safetensors")[key]
    aligned, base = (load_file(folder / role / "model.safetensors")[f"{MODULE}.weight"] for role in ("aligned", "base"))
    v = aligned.astype(float) - base
    expected = v @ (v.T @ load_file(folder / "adapter" / "adapter_model.safetensors")[key]) / np.linalg.norm(v)
    if not np.linalg.norm(written - expected) <= 1e-6 * np.linalg.norm(expected):
        sys.exit(f"the projection at level {level or 'widest'} is not C·B")
    digest = hashlib.sha256(written.tobytes()).hexdigest()[:16]
    if digest != DIGEST:
        sys.exit(f"the projection at level {level or 'widest'} has the digest {digest}, it must be {DIGEST}")


def main(examples: str | None = None) -> None:
    """Run all checks, and say in one line what was checked."""
    if version("safelora-fast") != safelora_fast.__version__:
        sys.exit(f"the package says {version('safelora-fast')}, its extension {safelora_fast.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pair(folder)
        for level in ("", "scalar"):
            check_projection(folder, level)
        if find_spec("torch") is None:
            try:
                safelora_fast.defend  # noqa: B018
            except MissingDependencyError as error:
                trained = f"without torch: {error}"
            else:
                sys.exit("defend was imported without torch")
        else:
            run(sys.executable, "-m", "safelora_fast", "env", "--self-test")
            scripts = sorted(path.resolve() for path in Path(examples).glob("*_*.py")) if examples else []
            os.chdir(folder)
            for script in scripts:
                run(sys.executable, script)
            trained = f"torch {version('torch')}: self-test, {len(scripts)} examples"
    print(f"Python {sys.version.split()[0]}, {safelora_fast._core.kernel_level()} kernels, {trained}")


if __name__ == "__main__":
    main(*sys.argv[1:])
