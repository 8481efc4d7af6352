"""Weights that are stored (in, out): transformers' Conv1D, also in custom models."""

from __future__ import annotations

import json

import pytest
import torch
from families import adapt, assert_projected, project, save, weights
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from safelora_fast.errors import PairingError
from safelora_fast.subspace.safe_subspace import SafeSubspace

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")


def build(modules, seed):
    """Return a custom model from (class, out, in) for each name."""
    torch.manual_seed(seed)
    model = nn.Module()
    for name, (kind, out, inner) in modules.items():
        model.add_module(name, Conv1D(out, inner) if kind is Conv1D else nn.Linear(inner, out))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def pair(tmp_path, modules, model_type=None, **config):
    """Return both models on disk, an adapter with changed settings, the adapted model, and the base weights."""
    folders = []
    for seed, role in enumerate(("aligned", "base"), 1):
        folders.append(tmp_path / role)
        folders[-1].mkdir()
        save_file(build(modules, seed).state_dict(), folders[-1] / "model.safetensors", {"format": "pt"})
        if model_type is not None:
            (folders[-1] / "config.json").write_text(json.dumps({"model_type": model_type}))
    target = {"target_modules": list(modules)}
    adapted, base_weights = adapt(build(modules, 1), **target), weights(adapt(build(modules, 2), **target))
    adapter = save(adapted, tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return folders, adapter, adapted, base_weights


SQUARE = {"conv1d": (Conv1D, 32, 32)}
RIGHT = {
    "a square conv1d": (SQUARE, None, {"fan_in_fan_out": True}),
    "a square c_proj": ({"c_proj": (Conv1D, 32, 32)}, None, {"fan_in_fan_out": True}),
    "a square linear": ({"lin0": (nn.Linear, 32, 32)}, None, {}),
    "a square linear of a model with a wrong setting": (
        {"q_proj": (nn.Linear, 32, 32)},
        "llama",
        {"fan_in_fan_out": True},
    ),
    "a square c_proj that is Linear, as in gpt_bigcode": ({"c_proj": (nn.Linear, 32, 32)}, "gpt_bigcode", {}),
    "of another name in a model of transformers": ({"mixer": (nn.Linear, 32, 32)}, "llama", {}),
    "shapes tell, Linear last": ({"mixer": (Conv1D, 24, 32), "other": (nn.Linear, 16, 32)}, None, {}),
    "shapes tell, Conv1D last": ({"other": (nn.Linear, 16, 32), "mixer": (Conv1D, 24, 32)}, None, {}),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_tells_the_orientation(tmp_path, case):
    modules, model_type, config = RIGHT[case]
    folders, adapter, adapted, base_weights = pair(tmp_path, modules, model_type, **config)
    (result,) = project([adapter], *folders, tmp_path / "output")
    assert_projected(result, adapted, base_weights)


@pytest.mark.parametrize(
    ("modules", "model_type", "fan_in_fan_out"),
    [
        (SQUARE, None, False),
        (SQUARE, "mine", False),
        ({"c_proj": (Conv1D, 32, 32)}, None, False),
        ({"mixer": (Conv1D, 32, 32)}, None, True),
        ({"mixer": (Conv1D, 32, 32)}, None, False),
        ({"mixer": (Conv1D, 32, 32)}, "mine", True),
        ({"lin0": (nn.Linear, 32, 32)}, None, True),
    ],
)
def test_a_square_of_which_nothing_tells(tmp_path, modules, model_type, fan_in_fan_out):
    folders, adapter, _, _ = pair(tmp_path, modules, model_type, fan_in_fan_out=fan_in_fan_out)
    with pytest.raises(PairingError, match=r"tells whether \w+\.weight \[32, 32\] is kept \(out, in\), as by Linear"):
        project([adapter], *folders, tmp_path / "output")


def test_a_subspace_of_a_conv1d(tmp_path):
    """There is no adapter whose shapes could decide."""
    folders, _, _, _ = pair(tmp_path, {"conv1d": (Conv1D, 24, 32)})
    with pytest.raises(PairingError, match="as by Conv1D"):
        SafeSubspace.build(aligned=folders[0], base=folders[1], modules=["conv1d"], rank=2)
