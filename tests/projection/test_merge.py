"""SafeMERGE: the merged factors against dense float64, the reported error, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from command_line import call
from plain_pair import module_names, write_adapter, write_pair
from safetensors.torch import load_file, save_file

from safelora_fast import project_adapter
from safelora_fast.errors import SafeLoraFastError
from safelora_fast.projection.merge import merge

__all__ = ["call"]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path / "pair")


@pytest.fixture
def safe(tmp_path):
    folder = write_adapter(tmp_path / "safe", 9, rank=3)
    config = json.loads((folder / "adapter_config.json").read_text())
    more = {"lora_alpha": 12, "use_rslora": True, "alpha_pattern": {"q_proj": 5}}
    (folder / "adapter_config.json").write_text(json.dumps(config | more))
    return folder


def update(folder, name):
    """Return s·B·A of a module in float64, with PEFT's scaling."""
    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text())
    lora_b, lora_a = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double().numpy() for side in "BA")
    alpha = config.get("alpha_pattern", {}).get(name.rpartition(".")[2], config["lora_alpha"])
    rank = lora_b.shape[1]
    return alpha / (np.sqrt(rank) if config.get("use_rslora") else rank) * lora_b @ lora_a, rank


def nearest(matrix, rank):
    u, values, w = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * values[:rank] @ w[:rank], np.linalg.norm(values[rank:]) / np.linalg.norm(values)


@pytest.mark.parametrize("select", [{"select": "all"}, {"select": "number", "num_layers": 2}], ids=["all", "number"])
def test_selected_modules_are_the_nearest_merge_of_their_rank(pair, safe, select):
    models = {"aligned": pair.aligned, "base": pair.base}
    plain = project_adapter(pair.adapter, **models, output=None, operator="zero", **select)
    report = project_adapter(
        pair.adapter, **models, output=pair.output, operator="merge", weight=0.8, safe_adapter=safe, **select
    )
    before = load_file(pair.adapter / WEIGHTS)
    after = load_file(pair.output / WEIGHTS)
    modules = zip(report.adapters[0].modules, plain.adapters[0].modules, strict=True)
    assert sorted(module.name for module in report.adapters[0].modules) == sorted(module_names())
    for module, former in modules:
        assert (module.cosine, module.projected) == (former.cosine, former.projected)
        if not module.projected:
            assert all(torch.equal(after[key], before[key]) for key in before if f".{module.name}." in key)
            continue
        (own, rank), (other, _), (found, _) = (
            update(folder, module.name) for folder in (pair.adapter, safe, pair.output)
        )
        expected, error = nearest(0.8 * own + 0.2 * other, rank)
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
        assert module.merge_error == pytest.approx(error, rel=1e-6)
        assert module.gain == pytest.approx(np.linalg.norm(expected) / np.linalg.norm(own), rel=1e-5)
    assert any("merged updates were cut to the adapter's rank" in warning for warning in report.warnings)
    content = json.loads((pair.output / "safelora_report.json").read_text())
    assert content["settings"]["safe_adapter"] == "safe"  # no path of this machine
    assert "SafeMERGE (weight 0.8)" in (pair.output / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded_once(pair, safe, dtype):
    for folder in (pair.adapter, safe):
        tensors = load_file(folder / WEIGHTS)
        save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    given = {"operator": "merge", "weight": 0.5, "safe_adapter": safe, "select": "all"}
    project_adapter(pair.adapter, aligned=pair.aligned, base=pair.base, output=pair.output, **given)
    for name in module_names():
        (own, rank), (other, _), (found, _) = (update(folder, name) for folder in (pair.adapter, safe, pair.output))
        expected, _ = nearest(0.5 * own + 0.5 * other, rank)
        assert np.linalg.norm(found - expected) <= 2.0**-7 * np.linalg.norm(expected)


def test_the_ends_of_the_weight():
    random = np.random.default_rng(0)
    (b, a), (c, d) = ((random.standard_normal((9, 2)), random.standard_normal((2, 7))) for _ in range(2))
    (left, right), error = merge((1.0, b, a), (0.0, c, d))
    assert np.allclose(left @ right, b @ a)
    assert error < 1e-12
    (left, right), error = merge((0.0, b, a), (3.0, c, d))
    assert np.allclose(left @ right, 3 * c @ d)
    (left, right), error = merge((1.0, 0 * b, a), (1.0, 0 * c, d))
    assert (np.abs(left @ right).max(), error) == (0, 0)


def test_from_the_command_line_in_parts_and_in_a_fleet(pair, safe, call, tmp_path):
    words = ["--operator", "merge", "--weight", "0.8", "--safe-adapter", safe, "--select", "all"]
    assert call(*pair.command(*words)).code == 0
    expected = (pair.output / WEIGHTS).read_bytes()
    for shard in ("0/2", "1/2"):
        assert (
            call(*pair.command("--modules-shard", shard, "--output", tmp_path / "parts", *words, output=False)).code
            == 0
        )
    joined = tmp_path / "joined"
    assert call(*pair.command("--join", tmp_path / "parts", "--output", joined, *words, output=False)).code == 0
    assert (joined / WEIGHTS).read_bytes() == expected
    rows = tmp_path / "list.jsonl"
    rows.write_text(json.dumps({"id": "a", "adapter": str(pair.adapter)}) + "\n")
    fleet = ["project", "--from", rows, "--aligned", pair.aligned, "--base", pair.base, "--output", tmp_path / "fleet"]
    assert call(*fleet, *words).code == 0
    assert (tmp_path / "fleet" / "a" / WEIGHTS).read_bytes() == expected
    tensors = load_file(safe / WEIGHTS)
    save_file({key: -tensor for key, tensor in tensors.items()}, safe / WEIGHTS, {"format": "pt"})
    code, _, err = call(*fleet, *words)
    assert (code, "was made from something else (settings.safe_adapter was" in err) == (1, True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 0.8}, "operator merge needs safe_adapter"),
        ({"safe_adapter": "x"}, "operator merge needs weight"),
        ({"safe_adapter": 3, "weight": 0.8}, "safe_adapter must be a path or a Hub id, not 3"),
        ({"safe_adapter": "x", "weight": 1.5}, "weight must lie between 0 and 1 in a merge, not 1.5"),
    ],
)
def test_settings_that_do_not_fit(pair, given, message):
    with pytest.raises(SafeLoraFastError, match=message):
        project_adapter(pair.adapter, aligned=pair.aligned, base=pair.base, output=None, operator="merge", **given)


def test_a_safe_adapter_that_does_not_fit_is_refused(pair, safe, tmp_path):
    def merged(**more):
        given = {"output": pair.output, "operator": "merge", "weight": 0.5, "safe_adapter": safe, "select": "all"}
        return project_adapter(pair.adapter, aligned=pair.aligned, base=pair.base, **{**given, **more})

    tensors = load_file(safe / WEIGHTS)
    first = sorted(tensors)[0]
    name = first.removeprefix("base_model.model.").rpartition(".lora_")[0]
    save_file({**tensors, first: tensors[first] * float("nan")}, safe / WEIGHTS, {"format": "pt"})
    with pytest.raises(SafeLoraFastError, match="holds NaN or Inf"):
        merged()
    less = {key: tensor for key, tensor in tensors.items() if name not in key}
    save_file(less, safe / WEIGHTS, {"format": "pt"})
    with pytest.raises(SafeLoraFastError, match=f"{name}: the safe adapter .* has no such module"):
        merged()
    assert not pair.output.exists()
    assert len(merged(exclude=name).adapters[0].projected) == len(module_names()) - 1
    with pytest.raises(SafeLoraFastError, match="nowhere"):
        merged(safe_adapter=tmp_path / "nowhere", output=None)
