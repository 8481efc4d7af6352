"""Tests of a whole comparison: every value of the report against an independent computation."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_comparison import train_inside, write_comparison

from safelora_fast import project_adapter
from safelora_fast.compare import train_runs
from safelora_fast.compare.measures.scaled import scale_update
from safelora_fast.data.rows import read_rows
from safelora_fast.data.tokens import Encoder
from safelora_fast.errors import SettingsError
from safelora_fast.models.load import load_subject
from safelora_fast.models.model_settings import SubjectSettings
from safelora_fast.scoring.margin import answer_margin


def subject(made, adapter=None):
    return load_subject(SubjectSettings(made.values()["recipe"]["model"]["path"], "float32", "cpu"), adapter)


def vars_of(one):
    return one.model, one.tokenizer


def plain_drift(made, adapter, rows):
    """Return tokens, loss, the reference's loss and divergence of each completion, computed one by one in float64."""
    own, reference = subject(made, adapter), subject(made)
    found = []
    for example in Encoder(own.tokenizer).encode(read_rows(made.values()["measure"][rows])).examples:
        with torch.no_grad():
            ours, theirs = (
                one.model.double()(torch.tensor([example.ids])).logits[0].log_softmax(-1) for one in (own, reference)
            )
        where = [position for position, label in enumerate(example.labels[1:]) if label != -100]
        labels = [example.labels[position + 1] for position in where]
        losses = [-one[where, labels].sum().item() for one in (ours, theirs)]
        found.append((len(where), *losses, (ours[where].exp() * (ours[where] - theirs[where])).sum().item()))
    return found


def per_token(rows, value):
    return sum(value(*row) for row in rows) / sum(row[0] for row in rows)


def adapter_of(made, run, seed):
    return made.output / run.lower() / f"seed-{seed}" / "adapter"


@pytest.mark.parametrize("run", ["none", "KL"])
def test_learning_and_drift_are_those_of_single_answers(made, run):
    cells = made.cells(run)
    for place in (0, 1):
        narrow = plain_drift(made, adapter_of(made, run, place), "narrow")
        general = plain_drift(made, adapter_of(made, run, place), "general")
        expected = {
            "learned": per_token(narrow, lambda _n, own, other, _kl: other - own),
            "divergence": per_token(general, lambda _n, _own, _other, kl: kl),
            "general_loss": per_token(general, lambda _n, own, other, _kl: own - other),
        }
        for key, figure in expected.items():
            seed = cells[key]["seeds"][place]
            assert (seed["seed"], seed["failure"]) == (place, None)
            assert seed["value"] == pytest.approx(figure, rel=1e-3, abs=1e-6), key
            assert (made.output / seed["source"]).is_file()
    for key in ("learned", "divergence"):
        seeds = [seed["value"] for seed in cells[key]["seeds"]]
        assert cells[key]["value"] == pytest.approx(sum(seeds) / 2)
        assert cells[key]["low"] < cells[key]["value"] < cells[key]["high"]


def test_the_margin_is_that_of_the_command(made):
    reference = subject(made)
    start = answer_margin(reference.model, reference.tokenizer)
    for seed in made.cells("KL")["margin_rise"]["seeds"]:
        one = subject(made, adapter_of(made, "KL", seed["seed"]))
        rise, _ = answer_margin(one.model, one.tokenizer).change_from(start)
        assert seed["value"] == pytest.approx(rise, abs=1e-6)


def test_shares_and_costs_are_held_against_the_first_run_of_the_same_seed(made):
    none, kl = made.cells("none"), made.cells("KL")
    assert [seed["value"] for seed in none["learned_share"]["seeds"]] == [1.0, 1.0]
    for own, first, share in zip(
        kl["learned"]["seeds"], none["learned"]["seeds"], kl["learned_share"]["seeds"], strict=True
    ):
        assert share["value"] == pytest.approx(own["value"] / first["value"])
    for seed, relative in enumerate(kl["relative"]["seeds"]):
        own, first = (
            json.loads((adapter_of(made, run, seed) / "safelora_train.json").read_text()) for run in ("KL", "none")
        )
        assert relative["value"] == pytest.approx(own["step_seconds"] / first["step_seconds"])
        assert own["peak_bytes"]["resident"] > 1e8


def test_operator_swap_is_trained_and_counted_where_asked(made):
    cell = made.cells("KL")["exact"]
    assert [seed["seed"] for seed in cell["seeds"]] == [0]
    content = json.loads((made.output / "kl" / "seed-0" / "operator_swap.json").read_text())
    assert len(content["hits"]) == 6
    assert cell["value"] == sum(content["hits"]) / 6
    record = json.loads(
        (made.output / "kl" / "seed-0" / "operator-swap" / "adapter" / "safelora_train.json").read_text()
    )
    assert record["recipe"]["data"]["path"] == str(made.output / "operator-swap" / "train.jsonl")
    assert record["defenses"]["kl"]["settings"]["weight"] == 3.0
    assert made.cells("reference")["exact"]["value"] is not None


def test_the_sweep_is_the_first_run_projected(made, tmp_path):
    low, high = made.report()["sweep"]
    none = made.cells("none")
    assert (low["threshold"], low["projected"], high["threshold"]) == (-1.0, 0, 1.0)
    assert high["projected"] == high["modules"] > 0
    assert low["cells"]["learned"]["value"] == pytest.approx(none["learned"]["value"], rel=1e-5)
    folder = made.path.parent
    whole = []
    for seed in (0, 1):
        project_adapter(
            adapter_of(made, "none", seed), aligned=folder / "model", base=folder / "base",
            output=tmp_path / str(seed), threshold=1.0,
        )  # fmt: skip
        whole.append(per_token(plain_drift(made, tmp_path / str(seed), "general"), lambda _n, _o, _r, kl: kl))
    assert high["cells"]["divergence"]["value"] == pytest.approx(sum(whole) / 2, rel=1e-3, abs=1e-7)
    assert not list(made.output.rglob("thresholds"))


def test_the_path_goes_from_nothing_to_the_whole_update(made):
    plot, none = made.report()["plot"], made.cells("none")
    start, half, end = plot["path"]
    assert start == [0.0, 0.0, ""]
    assert end == [pytest.approx(none["learned"]["value"]), pytest.approx(none["divergence"]["value"]), "100 %"]
    assert half[2] == "50 %"
    assert 0 < half[1] < end[1]


def test_the_margin_of_the_scaled_update_is_that_of_a_scaled_adapter(made):
    plot = made.report()["margin_plot"]
    start, half, end = plot["path"]
    assert (plot["y"], start) == ("margin_rise", [0.0, 0.0, ""])
    assert end[1] == pytest.approx(made.cells("none")["margin_rise"]["value"])
    before, rises = answer_margin(*vars_of(subject(made))), []
    for seed in (0, 1):
        one = subject(made, adapter_of(made, "none", seed))
        scale_update(one.model, 0.5)
        rises.append(answer_margin(*vars_of(one)).change_from(before)[0])
    assert half[1] == pytest.approx(sum(rises) / 2, abs=1e-6)
    page = (made.output / "report.html").read_text()
    assert page.count('<figure class="learning">') == 2
    names = re.findall(r' id="([^"]+)"', page)
    assert len(set(names)) == len(names), "two drawings share an id"


def test_a_second_run_trains_and_measures_nothing_and_writes_the_same(copied, trained, call, monkeypatch):
    files = {path: path.read_bytes() for path in copied.output.rglob("*") if path.is_file()}
    monkeypatch.setattr("safelora_fast.compare.measures.base.Measure.take_and_keep", None)
    result = call(*copied.words())
    assert result.code == 0, result.err
    assert trained == []
    assert "training" not in result.err
    assert "narrow learned" in result.out
    assert "\\n" not in result.out
    changed = {path.name for path, content in files.items() if path.read_bytes() != content}
    assert changed <= {"compare.yaml", "report.html", "report.md", "report.json"}
    again = copied.output / "report.json"
    first = again.read_bytes()
    assert call(*copied.words("--report-only")).code == 0
    assert again.read_bytes() == first


def test_a_run_whose_recipe_has_changed_is_refused_and_then_trained_anew_alone(copied, trained, call):
    copied.edit(runs={"none": {}, "KL": {"defenses": {"kl": {"weight": 9.0}}}}, seeds=[0])
    before = copied.cells("KL")["divergence"]["seeds"][0]["value"]
    result = call(*copied.words("-q"))
    assert result.code == 2
    assert "defenses.kl.weight was 3.0, is 9.0" in result.err
    assert trained == []
    assert call(*copied.words("-q", "--overwrite")).code == 0
    assert [path.split("/seed-0")[0].rpartition("/")[2] for path in trained] == ["kl", "kl"]
    assert copied.cells("KL")["divergence"]["seeds"][0]["value"] < before


def test_data_that_have_changed_are_noticed(copied, made, trained, call):
    rows = made.values()["recipe"]["data"]["path"]
    other = copied.path.parent / "train.jsonl"
    other.write_bytes(Path(rows).read_bytes())
    for record in copied.output.rglob("safelora_train.json"):
        record.write_text(record.read_text().replace(rows, str(other)))
    recipe = copied.values()["recipe"]
    copied.edit(recipe={**recipe, "data": {"path": str(other)}})
    assert call(*copied.words("-q")).code == 0
    other.write_text(other.read_text() + '{"prompt": "more?", "completion": "no"}\n')
    result = call(*copied.words("-q"))
    assert result.code == 2
    assert "has changed since this run" in result.err
    assert trained == []


def test_runs_that_fail_are_marked_and_tried_again(tmp_path, trained, call, monkeypatch):
    comparison = write_comparison(tmp_path, seeds=[0])
    rows = {name: comparison.values()["measure"][name] for name in ("narrow", "general")}
    comparison.edit(runs={"none": {}, "odd": {}}, measure={**rows, "device": "cpu"})
    inside = train_runs._run

    def unlucky(command, *, talk):
        return "the adapter holds <NaN>" if "/odd/" in command[-2] else inside(command, talk=talk)

    monkeypatch.setattr(train_runs, "_run", unlucky)
    result = call(*comparison.words())
    assert result.code == 1
    assert "warning: odd, seed 0, all measures: the adapter holds <NaN>" in result.err
    cells = comparison.cells("odd")
    for key in ("margin_rise", "learned", "divergence"):
        assert cells[key]["value"] is None
        assert cells[key]["seeds"][0]["failure"] == "the adapter holds <NaN>"
        assert cells[key]["seeds"][0]["source"] == "odd/seed-0/failure.json"
    assert comparison.cells("none")["learned"]["value"] > 0
    assert comparison.report()["complete"] is False
    assert "holds &lt;NaN&gt;" in (comparison.output / "report.html").read_text()
    assert "holds" in (comparison.output / "report.md").read_text()
    monkeypatch.setattr(train_runs, "_run", inside)
    trained.clear()
    assert call(*comparison.words("-q")).code == 0
    assert len(trained) == 1
    assert comparison.report()["complete"] is True
    assert comparison.cells("odd")["divergence"]["value"] == comparison.cells("none")["divergence"]["value"]


@pytest.mark.usefixtures("trained")
def test_a_measurement_that_fails_is_marked(copied, call, monkeypatch):
    def fail(*_arguments, **_settings):
        raise SettingsError("out of memory with 4096 tokens in a batch")

    for file in copied.output.glob("*/seed-*/margin.json"):
        file.unlink()
    monkeypatch.setattr("safelora_fast.scoring.margin.answer_margin", fail)
    assert call(*copied.words("-q")).code == 1
    assert [seed["failure"] for seed in copied.cells("KL")["margin_rise"]["seeds"]] == [
        "out of memory with 4096 tokens in a batch"
    ] * 2
    assert copied.cells("KL")["learned"]["value"] is not None
    monkeypatch.undo()
    train_inside(monkeypatch)
    assert call(*copied.words("-q")).code == 0


def test_a_report_of_what_is_there(copied, trained, call):
    shutil.rmtree(copied.output / "kl" / "seed-1")
    (copied.output / "none" / "seed-0" / "margin.json").unlink()
    assert call(*copied.words("--report-only", "-q")).code == 1
    assert trained == []
    assert [seed["failure"] for seed in copied.cells("KL")["learned"]["seeds"]] == [None, "not trained yet"]
    assert [seed["failure"] for seed in copied.cells("none")["margin_rise"]["seeds"]] == ["not measured yet", None]
    sources = {
        seed["source"] for name in ("none", "KL") for cell in copied.cells(name).values() for seed in cell["seeds"]
    }
    assert "" in sources
    assert all((copied.output / source).is_file() for source in sources - {""})
    page = (copied.output / "report.html").read_text() + (copied.output / "report.md").read_text()
    assert "none/seed-0/margin.json" not in page


def test_costs_can_be_left_out(copied, call):
    copied.edit(measure={**copied.values()["measure"], "costs": False})
    assert call(*copied.words("--report-only", "-q")).code == 0
    assert {column["criterion"] for column in copied.report()["columns"]} == {"aligned", "benign", "narrow", "coherent"}


def test_finished_adapters_are_taken(copied, made, trained, call):
    adapters = {str(seed): str(adapter_of(made, "KL", seed)) for seed in (0, 1)}
    copied.edit(runs={"none": {}, "published": {"adapters": adapters}})
    assert call(*copied.words("-q")).code == 0
    assert trained == []
    own, other = made.cells("KL"), copied.cells("published")
    assert other["divergence"]["value"] == own["divergence"]["value"]
    assert "exact" not in other
    copied.edit(runs={"none": {}, "published": {"adapters": {"0": str(made.path.parent)}}})
    result = call(*copied.words("-q"))
    assert (result.code, "holds no adapter" in result.err) == (2, True)


def test_what_is_missing_is_said_before_the_first_step(tmp_path, trained, call):
    comparison = write_comparison(tmp_path)
    measure = comparison.values()["measure"]
    for section, words in (
        ({"measure": {**measure, "narrow": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"measure": {**measure, "sweep": {"base": "nowhere/base"}}}, "nowhere/base"),
        ({"measure": measure, "runs": {"none": {"defenses": {"kl": {"weigth": 1}}}}}, "weigth"),
        (
            {"runs": {"none": {}, "odd": {"lora": {"target_modules": ["nothing"]}}}},
            "lora.target_modules: Target modules",
        ),
    ):
        comparison.edit(**section)
        result = call(*comparison.words())
        assert result.code == 2
        assert words in result.err
        assert ("error: odd, seed 0: " in result.err) == ("runs" in section and "measure" not in section)
        assert not list(comparison.output.rglob("seed-*"))
    assert trained == []


@pytest.mark.usefixtures("trained")
def test_a_folder_of_somebody_elses_is_left_alone(tmp_path, call):
    comparison = write_comparison(tmp_path)
    comparison.output.mkdir()
    (comparison.output / "thesis.txt").write_text("years of work")
    result = call(*comparison.words())
    assert result.code == 2
    assert "not of a comparison" in result.err
    assert [path.name for path in comparison.output.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_that_is_interrupted_ends_its_training_and_keeps_its_steps(tmp_path, number, code):
    """Starts a real process with a real training, which must end when its parent is gone."""
    comparison = write_comparison(tmp_path, seeds=[0], runs={"none": {}})
    recipe = comparison.values()["recipe"]
    recipe["training"] |= {"max_steps": 4000, "save_strategy": "steps", "save_steps": 2000}
    comparison.edit(recipe=recipe, measure={"device": "cpu", "margin": False})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "safelora_fast", *comparison.words()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        record = comparison.output / "none" / "seed-0" / "adapter" / "safelora_train.json"
        assert within(120, record.exists)
        time.sleep(1)
        process.send_signal(number)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert not json.loads(record.read_text())["finished"]
    all_processes = ["ps", "-eo", "args"]
    training = str(comparison.output)
    assert within(
        60, lambda: training not in subprocess.run(all_processes, capture_output=True, text=True, check=True).stdout
    )
    if number == signal.SIGINT:  # after SIGKILL, the training may end before it saves its step
        assert "the same command goes on" in said
        step = max(int(path.name.partition("-")[2]) for path in record.parent.glob("checkpoints/checkpoint-*"))
        assert 0 < step < 4000


def within(seconds, condition):
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return met


def test_a_run_that_is_told_to_end_tells_its_training(tmp_path):
    child = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit('ended')); open('{}', 'w').close(); time.sleep(60)"
    parent = (
        "import sys; from safelora_fast.compare import train_runs; "
        "train_runs._run([sys.executable, '-c', sys.argv[1]], talk=True)"
    )
    ready = tmp_path / "ready"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", parent, child.format(ready)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert within(120, ready.exists)
        process.send_signal(signal.SIGTERM)
        assert (process.communicate(timeout=60)[1], process.returncode) == ("ended\n", 143)


@pytest.mark.usefixtures("trained")
def test_json_is_the_report_and_nothing_else(copied, call):
    result = call(*copied.words("--report-only", "--json"))
    assert json.loads(result.out) == copied.report()


def test_a_child_that_ends_badly_says_why():
    said = train_runs._run([sys.executable, "-c", "import sys; sys.exit('error: no luck')"], talk=False)
    assert said == "no luck"
    killed = train_runs._run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], talk=False)
    assert "killed by signal 9" in killed
    assert train_runs._run([sys.executable, "-c", ""], talk=False) is None
