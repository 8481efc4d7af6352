"""The table of operators: complete entries, argument checks, and the tensors that attenuation writes."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from plain_pair import module_names, write_pair
from safetensors.numpy import load_file

from safelora_fast import _core, project_adapter
from safelora_fast.errors import SettingsError
from safelora_fast.projection.operators import OPERATORS, Name, operator_of, owners
from safelora_fast.projection.settings import OPTIONS, Settings, WholeModelSettings

METHODS = Path(__file__).parents[2] / "docs" / "methods.md"
ARGUMENTS = {"rank": 3, "keep": 0.25, "weight": 0.5, "safe_adapter": "safe"}


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.variant)
def test_every_operator_is_complete(operator):
    assert operator.name in get_args(Name)
    given = {name: ARGUMENTS[name] for names, _ in operator.required for name in names if name in ARGUMENTS}
    form = {} if operator.form is None else dict([operator.form])
    kind = Settings if operator.merges else WholeModelSettings
    settings = kind(operator.name, select="all", **given, **form)
    assert settings.described_operator is operator_of(settings.effective()) is operator
    assert isinstance(operator.in_rust(vars(settings)), _core.Operator)
    assert {*operator.arguments, *form} <= OPTIONS.keys()
    numbers = {name: value for name, value in given.items() if not isinstance(value, str)}
    assert all(f"{name} {value}" in operator.title(settings.effective()) for name, value in numbers.items())
    row = next(line for line in METHODS.read_text("utf-8").splitlines() if line.startswith(f"| `{operator.name}`"))
    assert all(f"--{name}" in row for name in form)
    assert f"| {operator.formula.split(', ')[0]}" in METHODS.read_text("utf-8")


def test_the_names_are_those_of_the_table():
    assert list(dict.fromkeys(operator.name for operator in OPERATORS)) == list(get_args(Name))
    assert owners("normalize") == ["safelora"]
    assert owners("rank") == ["orthogonal", "attenuate", "extrapolate"]
    assert owners("threshold") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operator": "attenuate", "keep": 0.5}, "operator attenuate needs either rank or energy: how much of V"),
        ({"operator": "attenuate", "rank": 2}, "operator attenuate needs keep: the share of the rest that stays"),
        ({"operator": "attenuate", "rank": 2, "energy": 0.5, "keep": 0.5}, "needs one of rank and energy, not both"),
        ({"operator": "attenuate", "rank": 2, "keep": 1.5}, "keep must lie between 0 and 1, not 1.5"),
        ({"operator": "attenuate", "rank": 2, "keep": 0.5, "sides": "up"}, "sides must be one of both, left, not 'up'"),
        ({"keep": 0.5}, "keep applies to operator attenuate only"),
        ({"operator": "zero", "rank": 2}, "rank applies to operator orthogonal and attenuate and extrapolate only"),
        (
            {"operator": "restore", "weight": 1},
            "operator restore changes whole models, not adapters: use project-model",
        ),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(SettingsError, match=message):
        Settings(**options)


def dense(folder):
    """Return the weights of a model in float64."""
    shards = [load_file(shard) for shard in folder.glob("*.safetensors")]
    return {name: tensor.astype(float) for shard in shards for name, tensor in shard.items()}


@pytest.mark.parametrize("sides", ["both", "left"])
@pytest.mark.parametrize("select", [{"select": "number", "num_layers": 2}, {"select": "all"}], ids=str)
def test_attenuation_writes_both_factors_of_the_selected_modules(tmp_path, sides, select):
    """Results equal CSULoRA's product form in float64, and all other tensors keep their bytes."""
    pair = write_pair(tmp_path)
    report = project_adapter(
        pair.adapter, aligned=pair.aligned, base=pair.base, output=pair.output, operator="attenuate", rank=3, keep=0.25,
        sides=sides, **select,
    )  # fmt: skip
    aligned, base = dense(pair.aligned), dense(pair.base)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (pair.adapter, pair.output))
    modules = {module.name: module for module in report.adapters[0].modules}
    assert modules.keys() == set(module_names())
    for name, module in modules.items():
        b, a = (f"base_model.model.{name}.lora_{factor}.weight" for factor in "BA")
        if not module.projected:
            assert all(after[key].tobytes() == before[key].tobytes() for key in (a, b))
            continue
        u, _, w = np.linalg.svd(aligned[f"{name}.weight"] - base[f"{name}.weight"])
        inside, outside = u[:, :3] @ u[:, :3].T, 0.25 * np.eye(len(u))
        expected_b = (inside + outside @ (np.eye(len(u)) - inside)) @ before[b]
        expected_a = before[a] @ (w[:3].T @ w[:3] + 0.25 * (np.eye(w.shape[1]) - w[:3].T @ w[:3]))
        expected_a = before[a] if sides == "left" else expected_a
        assert np.linalg.norm(after[b] - expected_b) <= 1e-3 * np.linalg.norm(expected_b)
        assert np.linalg.norm(after[a] - expected_a) <= 1e-3 * np.linalg.norm(expected_a)
        assert module.update_norm_after == pytest.approx(np.linalg.norm(expected_b @ expected_a), rel=1e-3)
        assert (after[a].tobytes() == before[a].tobytes()) == (sides == "left")
    assert "attenuation" in (pair.output / "README.md").read_text()
