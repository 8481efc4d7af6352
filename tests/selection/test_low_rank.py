"""LoRA updates added in place, compared with PEFT's own layers."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TARGETS, fill_adapter, tiny_peft_model

from safelora_fast.selection.perplexity import AddedInPlace, add_in_place

IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def layers(model):
    return [module for module in model.modules() if "default" in getattr(module, "lora_variant", {})]


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}], ids=str)
def test_the_outputs_are_those_of_peft(lora):
    model = tiny_peft_model(lora=lora).eval()
    model.add_adapter("other", model.peft_config["default"])
    fill_adapter(model, seed=7, adapter="other")
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = logits(model)
    with model.disable_adapter():
        expected["none"] = logits(model)
    add_in_place(model)
    assert len(layers(model)) == 3 * len(TARGETS)
    for name in ("default", "other"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected[name], rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected["none"])


def test_a_rounding_less_in_half_precision():
    """Each layer differs from float64 by at most one rounding of its output and one of A·x."""
    model = tiny_peft_model(layers=1).eval().bfloat16()
    add_in_place(model)
    layer = layers(model)[0]
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.no_grad():
        ours = layer(x).double()
        inner = (x.double() @ layer.lora_A["default"].weight.double().T).bfloat16().double()
        base = (x.double() @ layer.base_layer.weight.double().T).bfloat16().double()
    exact = base + layer.scaling["default"] * inner @ layer.lora_B["default"].weight.double().T
    torch.testing.assert_close(ours, exact, rtol=2**-8, atol=2e-2)


def test_other_kinds_of_layers_stay_as_they_are():
    model = tiny_peft_model(lora={"use_dora": True}).eval()
    expected = logits(model)
    add_in_place(model)
    assert not any(isinstance(layer.lora_variant["default"], AddedInPlace) for layer in layers(model))
    assert torch.equal(logits(model), expected)


def test_mixed_dtypes_are_added_apart():
    model = tiny_peft_model().eval()
    expected = logits(model)
    add_in_place(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(model).float(), expected, rtol=0.05, atol=0.05)
