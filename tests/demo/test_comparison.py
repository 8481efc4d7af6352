"""The training comparison on a tiny model: each variant apart, every figure beside an independent computation."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import replace

import pytest
import torch
from demo_model import save_tiny, tokenizer
from peft import PeftModel
from safetensors.torch import load_file

from safelora_fast.demo import apart, comparison, pipeline, text
from safelora_fast.demo.model import load
from safelora_fast.demo.preparation import train_adapter
from safelora_fast.demo.recipe import Recipe
from safelora_fast.demo.variants import Variant

RECIPE = Recipe(base_epochs=1, base_rate=1e-3, adapter_epochs=1, adapter_rate=2e-3, rank=4)
VARIANTS = (
    Variant("no defence"),
    Variant("KL + penalty", kl=3.0, feature_distance=1.0, subspace_penalty=1.0),
    Variant("SafeLora at the end", safelora=1.0),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    source = save_tiny(folder / "source", layers=5)
    report = comparison.run(folder / "output", source=source, recipe=RECIPE, variants=VARIANTS)
    return source, folder / "output", report


def plain_figures(model, reference, rows):
    """Loss and divergence per answer token by loops in float64, and their sums for each answer."""
    words, sums = tokenizer(), []
    for row in rows:
        example = text.conversation(words, row)
        with torch.no_grad():
            p, q = (each(torch.tensor([example.ids])).logits[0].double().log_softmax(-1) for each in (model, reference))
        loss = divergence = 0.0
        for position in range(example.start, len(example.ids)):
            p_here, q_here = p[position - 1], q[position - 1]
            loss -= p_here[example.ids[position]].item()
            divergence += sum((p_here.exp() * (p_here - q_here)).tolist())
        sums.append((len(example.ids) - example.start, loss, divergence))
    tokens = sum(count for count, _, _ in sums)
    return sum(loss for _, loss, _ in sums) / tokens, sum(kl for _, _, kl in sums) / tokens


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.folder)
def test_outcomes_are_those_of_the_saved_adapters(finished, variant):
    source, output, report = finished
    reference = load(source).eval()
    model = PeftModel.from_pretrained(load(source), output / variant.folder).eval()
    row = report["outcomes"][variant.name]
    narrow, _ = plain_figures(model, reference, text.rows("narrow_held_out"))
    general, divergence = plain_figures(model, reference, text.rows("general"))
    before, zero = plain_figures(reference, reference, text.rows("narrow_held_out"))
    assert zero == 0
    assert row["narrow"]["value"] == pytest.approx(narrow, rel=1e-5)
    assert row["narrow_change"]["value"] == pytest.approx(narrow - before, rel=1e-3)
    assert row["general"]["value"] == pytest.approx(general, rel=1e-5)
    assert row["divergence"]["value"] == pytest.approx(divergence, rel=1e-3)
    assert report["outcomes"]["reference"]["narrow"]["value"] == pytest.approx(before, rel=1e-5)


def test_costs_are_those_that_the_trainings_recorded(finished):
    _, output, report = finished
    medians = {}
    for variant in VARIANTS:
        record = json.loads((output / variant.folder / "training.json").read_text())
        assert len(record["step_seconds"]) == 12  # 96 rows in batches of 8, once
        medians[variant.name] = statistics.median(record["step_seconds"][5:])
        cost = report["costs"][variant.name]
        assert cost["step"] == medians[variant.name]
        assert cost["relative"] == medians[variant.name] / medians["no defence"]
        assert cost["steps"] == pytest.approx(sum(record["step_seconds"]))
        assert cost["peak"] == record["peak_bytes"] > 100e6  # torch alone is more


def test_a_variant_is_what_training_in_this_process_gives(finished, tmp_path):
    """The child adds nothing of its own: same seed, same order, same defences, same bits."""
    source, output, _ = finished
    variant = VARIANTS[1]
    defenses = variant.defenses(source, output / "base", output / "train-subspace" / "subspace.safetensors")
    assert [defense.name for defense in defenses] == ["kl", "feature_distance", "subspace_penalty"]
    train_adapter(source, tmp_path, 0, RECIPE, lambda *_: None, defenses)
    here, there = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, output / variant.folder))
    assert all(torch.equal(here[key], there[key]) for key in there)
    plain = load_file(output / VARIANTS[0].folder / "adapter_model.safetensors")
    assert any(not torch.equal(plain[key], there[key]) for key in there)


def test_safelora_projects_the_undefended_adapter(finished):
    """Threshold 1 selects every module: B = C·B with the B of the undefended run."""
    source, output, _ = finished
    plain, projected = (load_file(output / VARIANTS[index].folder / "adapter_model.safetensors") for index in (0, 2))
    aligned, base = (load_file(folder / "model.safetensors") for folder in (source, output / "base"))
    for key, expected in plain.items():
        if "lora_A" in key:
            assert torch.equal(projected[key], expected)
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        v = aligned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        wanted = v @ (v.T @ expected.double()) / v.norm()
        assert (projected[key].double() - wanted).norm() < 1e-6 * wanted.norm()


def test_weakening_scales_the_undefended_update(finished):
    source, output, report = finished
    reference = load(source).eval()
    for share, row in report["weakened"].items():
        model = load(source).eval()
        weights = load_file(output / VARIANTS[0].folder / "adapter_model.safetensors")
        for name, parameter in model.named_parameters():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in weights:
                update = weights[f"{stem}.lora_B.weight"] @ weights[f"{stem}.lora_A.weight"]
                parameter.data += float(share) * 2 * update  # lora_alpha is twice the rank
        _, divergence = plain_figures(model, reference, text.rows("general"))
        assert row["divergence"]["value"] == pytest.approx(divergence, rel=1e-3)


def test_a_second_run_trains_nothing(finished, capsys):
    source, output, report = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    again = comparison.run(output, source=source, recipe=RECIPE, variants=VARIANTS)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == before
    assert {**again, "seconds": 0} == {**report, "seconds": 0}
    assert capsys.readouterr().out.count("(reused)") == 6


def test_the_report_is_what_was_returned(finished):
    _, output, report = finished
    written = json.loads((output / "demo_train_report.json").read_text())
    assert {**written, "seconds": 0} == {**report, "seconds": 0}
    assert report["base_is_a_stand_in"] is True
    assert (output / "demo_train.png").read_bytes().startswith(b"\x89PNG")


def test_the_projection_demo_shares_its_models(finished, capsys):
    source, output, _ = finished
    before = (output / "base" / "model.safetensors").stat().st_mtime_ns
    pipeline.run(output, source=source, recipe=RECIPE)
    assert (output / "base" / "model.safetensors").stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("(reused)") == 1
    undefended = load_file(output / VARIANTS[0].folder / "adapter_model.safetensors")
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(undefended[key], adapter[key]) for key in adapter)


class InThisProcess:
    """Stands in for the child: counts the variants trained, and interrupts one."""

    def __init__(self, monkeypatch, interrupted=""):
        self.trained, self.interrupted = [], interrupted
        monkeypatch.setattr(comparison, "train_apart", self)

    def __call__(self, task, progress):
        self.trained.append(task.variant.name)
        (task.folder / "half.txt").write_text("written")
        if task.variant.name == self.interrupted:
            raise KeyboardInterrupt
        course = train_adapter(
            task.aligned, task.folder, task.seed, task.recipe, progress,
            task.variant.defenses(task.aligned, task.base, task.subspace),
        )  # fmt: skip
        apart.record(task.folder, course)


def test_an_interrupted_variant_starts_anew_and_the_others_stay(finished, tmp_path, monkeypatch):
    source = finished[0]
    arguments = {"source": source, "recipe": RECIPE, "variants": VARIANTS}
    first = InThisProcess(monkeypatch, interrupted="KL + penalty")
    with pytest.raises(KeyboardInterrupt):
        comparison.run(tmp_path, **arguments)
    assert first.trained == ["no defence", "KL + penalty"]
    assert not (tmp_path / VARIANTS[1].folder).exists()
    assert not list(tmp_path.glob(".*"))
    second = InThisProcess(monkeypatch)
    report = comparison.run(tmp_path, **arguments)
    assert second.trained == ["KL + penalty", "SafeLora at the end"]
    assert report["outcomes"] == finished[2]["outcomes"]


def test_another_weight_trains_that_variant_only(finished, tmp_path, monkeypatch):
    source, output, _ = finished
    folder = shutil.copytree(output, tmp_path / "copy")
    changed = (VARIANTS[0], replace(VARIANTS[1], kl=0.5), VARIANTS[2])
    runs = InThisProcess(monkeypatch)
    comparison.run(folder, source=source, recipe=RECIPE, variants=changed)
    assert runs.trained == ["KL + penalty"]
    measured = json.loads((folder / "train-measured" / "stage.json").read_text())
    assert measured["settings"]["variants"][1]["kl"] == 0.5
