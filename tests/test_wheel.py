"""The wheel that `make wheel` built projects an adapter without torch, installed alone in an empty environment."""

from __future__ import annotations

import json
import subprocess
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.wheel

WHEELS = sorted((Path(__file__).parent.parent / "dist").glob("safelora_fast-*.whl"))
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def wheel() -> Path:
    if not WHEELS:
        pytest.skip("no wheel in dist/: run `make wheel`")
    return WHEELS[-1]


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `bin` folder of an environment with the wheel and its base requirements."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode and "Connection" in done.stderr:
        pytest.skip("no package index within reach")
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Return the aligned, base and adapter folders of one 24×40 module in float32."""
    generator = np.random.default_rng(0)
    base = generator.standard_normal((24, 40), dtype=np.float32)
    aligned = base + 0.1 * generator.standard_normal((24, 40), dtype=np.float32)
    for name, weight in {"aligned": aligned, "base": base}.items():
        (tmp_path / name).mkdir()
        save_file({f"{MODULE}.weight": weight}, tmp_path / name / "model.safetensors")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    factors = {
        f"base_model.model.{MODULE}.lora_A.weight": generator.standard_normal((3, 40), dtype=np.float32),
        f"base_model.model.{MODULE}.lora_B.weight": generator.standard_normal((24, 3), dtype=np.float32),
    }
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["q_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "aligned", tmp_path / "base", adapter


def test_projects_without_torch(environment: Path, pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    aligned, base, adapter = pair
    output = tmp_path / "projected"
    command = [environment / "safelora-fast", "project", adapter, "--aligned", aligned, "--base", base]
    done = subprocess.run(
        [*command, "--output", output, "--select", "all"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    torch = subprocess.run([environment / "python", "-c", "import torch"], capture_output=True, check=False)
    assert torch.returncode != 0, "the environment was meant to have no torch"

    v = (
        load_file(aligned / "model.safetensors")[f"{MODULE}.weight"].astype(np.float64)
        - load_file(base / "model.safetensors")[f"{MODULE}.weight"]
    )
    key = f"base_model.model.{MODULE}.lora_B.weight"
    expected = v @ v.T @ load_file(adapter / "adapter_model.safetensors")[key] / np.linalg.norm(v)
    written = load_file(output / "adapter_model.safetensors")[key]
    assert np.linalg.norm(written - expected) <= 1e-6 * np.linalg.norm(expected)


def test_files_that_are_no_code_come_along(wheel: Path) -> None:
    source = Path(__file__).parent.parent / "python"
    kinds = ("*.yaml", "*.jsonl", "*.txt", "*.css", "*.js", "*.j2", "py.typed")
    wanted = {path.relative_to(source).as_posix() for kind in kinds for path in source.rglob(kind)}
    assert {"safelora_fast/persona/traits/malicious.yaml", "safelora_fast/compare/templates/page.css"} <= wanted
    with zipfile.ZipFile(wheel) as archive:
        assert wanted <= set(archive.namelist())


def test_one_wheel_for_every_python_and_old_systems(wheel: Path) -> None:
    assert "-cp310-abi3-manylinux2014_" in wheel.name
