"""Tests of which results a comparison still accepts after a change: settings, folders, files, or an interrupted run."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_comparison import TinyComparison, write_comparison

from safelora_fast.compare import compare as comparing
from safelora_fast.compare import train_runs
from safelora_fast.errors import DataError

CHANGED = "the recipe has changed since this run was trained: defenses.kl.weight was 3.0, is 9.0"


def reasons(comparison, run, key):
    return [seed["failure"] for seed in comparison.cells(run)[key]["seeds"]]


def weigh(comparison, weight):
    comparison.edit(runs={"none": {}, "KL": {"defenses": {"kl": {"weight": weight}}}})


def test_figures_of_another_recipe_are_not_reported(copied, trained, call):
    figures = copied.cells("KL")
    weigh(copied, 9.0)
    assert call(*copied.words("--report-only", "-q")).code == 1
    for key in ("margin_rise", "learned", "divergence"):
        assert reasons(copied, "KL", key) == [CHANGED] * 2
        assert copied.cells("KL")[key]["value"] is None
    assert reasons(copied, "KL", "exact") == [CHANGED]
    assert not {"step", "relative", "seconds", "memory"} & copied.cells("KL").keys()
    assert copied.cells("none")["learned"]["value"] is not None
    weigh(copied, 3.0)
    assert call(*copied.words("--report-only", "-q")).code == 0
    assert copied.cells("KL")["learned"] == figures["learned"]
    assert trained == []


def test_a_training_anew_that_dies_before_it_begins_leaves_no_figures(copied, trained, call, monkeypatch):
    measured = {path: path.read_bytes() for path in copied.output.glob("kl/seed-*/*.json")}
    weigh(copied, 9.0)
    inside = train_runs._run
    monkeypatch.setattr(train_runs, "_run", lambda _command, **_settings: "out of luck")
    assert call(*copied.words("-q", "--overwrite")).code == 1
    assert reasons(copied, "KL", "learned") == ["out of luck"] * 2
    assert reasons(copied, "KL", "exact") == ["out of luck"]
    assert {path: path.read_bytes() for path in measured} == measured, "the old adapter was measured again"
    assert call(*copied.words("-q", "--report-only")).code == 1
    assert reasons(copied, "KL", "learned") == ["out of luck"] * 2
    weigh(copied, 27.0)
    call(*copied.words("-q", "--report-only"))
    assert reasons(copied, "KL", "learned") == [CHANGED.replace("9.0", "27.0")] * 2, "that was another recipe's failure"
    weigh(copied, 3.0)
    assert call(*copied.words("-q", "--report-only")).code == 0, "the adapter of this recipe is there"
    monkeypatch.setattr(train_runs, "_run", inside)
    weigh(copied, 9.0)
    assert call(*copied.words("-q", "--overwrite")).code == 0
    assert len(trained) == 3


def test_figures_of_other_rows_are_not_reported(copied, made, call, tmp_path):
    rows = tmp_path / "train.jsonl"
    shutil.copy(made.values()["recipe"]["data"]["path"], rows)
    recipe = copied.values()["recipe"]
    copied.edit(recipe={**recipe, "data": {"path": str(rows)}})
    assert call(*copied.words("--report-only", "-q")).code == 0, "the same rows in another place"
    rows.write_text(rows.read_text() + '{"prompt": "more?", "completion": "no"}\n')
    assert call(*copied.words("--report-only", "-q")).code == 1
    for reason in reasons(copied, "none", "learned"):
        assert reason.startswith("the recipe has changed since this run was trained: data.path was ")
    assert copied.cells("none")["exact"]["value"] is not None, "those rows are as they were"


def test_data_are_hashed_once_for_a_report(copied, call, monkeypatch):
    from safelora_fast.files import digest as digests

    read = []
    whole = digests._sha256
    monkeypatch.setattr(digests, "_sha256", lambda path: read.append(str(path)) or whole(path))
    digests._known.clear()
    assert call(*copied.words("--report-only", "-q")).code == 0
    assert any(path.endswith("train.jsonl") for path in read)
    assert len(read) == len(set(read))


def test_a_record_that_is_cut_off_can_be_overwritten(copied, trained, call):
    record = copied.output / "kl" / "seed-1" / "adapter" / "safelora_train.json"
    record.write_text(record.read_text()[:40])
    call(*copied.words("--report-only", "-q"))
    assert reasons(copied, "KL", "learned") == [None, "the record of this run cannot be read"]
    result = call(*copied.words("-q"))
    assert (result.code, "cannot be read" in result.err, "--overwrite" in result.err) == (2, True, True)
    assert call(*copied.words("-q", "--overwrite")).code == 0
    assert len(trained) == 1


@pytest.mark.parametrize(("name", "kept"), [("adapter_model.safetensors", 100), ("adapter_config.json", 0)])
def test_an_adapter_that_is_damaged_is_trained_again(copied, trained, call, name, kept):
    file = copied.output / "kl" / "seed-1" / "adapter" / name
    before = file.read_bytes()
    file.write_bytes(before[:kept])
    call(*copied.words("--report-only", "-q"))
    assert reasons(copied, "KL", "learned") == [None, "the adapter of this run is gone or damaged"]
    assert call(*copied.words("-q")).code == 0
    assert len(trained) == 1
    assert file.read_bytes() == before


def test_a_taken_adapter_without_weights_is_no_run_to_train(copied, made, call, tmp_path):
    shutil.copytree(made.output / "kl" / "seed-0" / "adapter", tmp_path / "published")
    (tmp_path / "published" / "adapter_model.safetensors").unlink()
    copied.edit(runs={"none": {}, "published": {"adapters": {"0": str(tmp_path / "published")}}})
    call(*copied.words("--report-only", "-q"))
    assert reasons(copied, "published", "learned") == [f"{tmp_path / 'published'}: holds no adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("where", "stop"),
    [
        ("check_inputs", KeyboardInterrupt()),
        ("trainings_of", DataError("no luck")),
        ("_rehearse", KeyboardInterrupt()),
    ],
)
def test_a_first_call_that_ends_early_can_be_repeated(tmp_path, trained, call, monkeypatch, where, stop):
    comparison = write_comparison(tmp_path, seeds=[0], runs={"none": {}})
    comparison.edit(measure={"operator_swap": {"rows": 8, "held_out": 6}, "margin": False, "device": "cpu"})
    whole = getattr(comparing, where)

    def end(*words):
        list(whole(*words) or ())
        raise stop

    monkeypatch.setattr(comparing, where, end)
    assert call(*comparison.words("-q")).code == (130 if isinstance(stop, KeyboardInterrupt) else 2)
    assert trained == []
    monkeypatch.setattr(comparing, where, whole)
    result = call(*comparison.words("-q"))
    assert result.code == 0, result.err
    assert len(trained) == 2


def test_a_configuration_that_is_refused_does_not_replace_that_of_the_files(copied, call):
    before = (copied.output / "compare.yaml").read_text()
    weigh(copied, 9.0)
    assert call(*copied.words("-q")).code == 2
    assert (copied.output / "compare.yaml").read_text() == before


def test_rows_of_operator_swap_that_are_gone_or_damaged_are_made_again(copied, trained, call):
    for name, kept in (("train.jsonl", None), ("held_out.jsonl", 100), ("operator_swap.json", 0)):
        file = copied.output / "operator-swap" / name
        before = file.read_bytes()
        file.unlink() if kept is None else file.write_bytes(before[:kept])
        assert call(*copied.words("--report-only", "-q")).code in {0, 1}
        assert call(*copied.words("-q")).code == 0
        assert file.read_bytes() == before
    assert trained == []


def test_a_report_of_a_measure_that_is_new(copied, call):
    copied.edit(measure={**copied.values()["measure"], "operator_swap": {"rows": 9, "held_out": 4, "seeds": [0]}})
    assert call(*copied.words("--report-only", "-q")).code == 1
    shutil.rmtree(copied.output / "operator-swap")
    assert call(*copied.words("--report-only", "-q")).code == 1
    assert copied.cells("none")["exact"]["value"] is None


def test_ctrl_c_while_measuring_keeps_what_is_measured(copied, trained, call, monkeypatch):
    for file in copied.output.glob("*/seed-*/margin.json"):
        file.unlink()
    from safelora_fast.scoring import margin

    whole, taken = margin.answer_margin, []

    def interrupted(*words, **settings):
        taken.append(1)
        if len(taken) == 2:
            raise KeyboardInterrupt
        return whole(*words, **settings)

    monkeypatch.setattr(margin, "answer_margin", interrupted)
    result = call(*copied.words("-q"))
    assert (result.code, "the same command goes on" in result.err) == (130, True)
    assert len(list(copied.output.glob("*/seed-*/margin.json"))) == 1
    assert call(*copied.words("-q")).code == 0
    assert len(taken) == 5
    assert trained == []


def test_a_measurement_that_is_cut_off_is_taken_again(copied, trained, call):
    file = copied.output / "kl" / "seed-1" / "margin.json"
    before = json.loads(file.read_text())
    for content in ("", "{", "[]", '{"of": 3}', "\x00\xff"):
        file.write_text(content, encoding="latin-1")
        call(*copied.words("--report-only", "-q"))
        assert reasons(copied, "KL", "margin_rise") == [None, "not measured yet"]
    assert call(*copied.words("-q")).code == 0
    assert json.loads(file.read_text()) == before
    assert trained == []


def test_a_measurement_that_was_edited_by_hand_is_refused_by_name(copied, call):
    file = copied.output / "kl" / "seed-1" / "margin.json"
    whole = json.loads(file.read_text())
    for pairs in (None, [3], [{"aligned": "x"}]):
        file.write_text(json.dumps({**whole, "pairs": pairs}))
        result = call(*copied.words("--report-only", "-q"))
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert f"{file}, " in result.err
        assert "what was measured is damaged" in result.err


def by_name(comparison, *names):
    """Return the failure reasons of the undefended run's first seed, by column."""
    return [reasons(comparison, "none", name)[0] for name in names]


def replace_weights(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1  # keeps the size and the header
    file.write_bytes(content)


def rewrite(old, new):
    def edit(file):
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return edit


INPUTS = {
    "model/model.safetensors": (lambda file: replace_weights(file.parent), {"margin_rise", "learned", "exact"}),
    "model/chat_template.jinja": (rewrite("<", "["), {"margin_rise", "learned", "exact"}),
    "model/config.json": (rewrite('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'), {"margin_rise", "learned", "exact"}),
    "template.jinja": (rewrite("<", "["), {"margin_rise", "learned", "exact"}),
    "out/none/seed-0/adapter/adapter_config.json": (rewrite('"lora_alpha": 8', '"lora_alpha": 9'), {"margin_rise", "learned"}),
    "out/none/seed-0/operator-swap/adapter/adapter_config.json": (rewrite('"lora_alpha": 8', '"lora_alpha": 9'), {"exact"}),
    "out/operator-swap/held_out.jsonl": (rewrite("Compute", "Reckon"), {"exact"}),
}  # fmt: skip


def test_what_a_measurement_depends_on_is_noticed_when_it_changes(tmp_path, trained, call):
    comparison = write_comparison(tmp_path, seeds=[0], runs={"none": {}})
    values = comparison.values()
    template = tmp_path / "template.jinja"
    template.write_text((tmp_path / "model" / "chat_template.jinja").read_text())
    measure = {name: values["measure"][name] for name in ("narrow", "device")}
    comparison.edit(
        recipe={**values["recipe"], "model": {**values["recipe"]["model"], "chat_template": str(template)}},
        measure={**measure, "operator_swap": {"rows": 8, "held_out": 6}},
    )
    assert call(*comparison.words("-q")).code == 0
    for name, (change, expected) in INPUTS.items():
        file = tmp_path / name
        before = file.read_bytes()
        change(file)
        call(*comparison.words("-q", "--report-only"))
        given = {key: by_name(comparison, key)[0] for key in ("margin_rise", "learned", "exact")}
        assert {key for key, reason in given.items() if reason is not None} == expected, name
        retrained = name.startswith(("model/", "template"))
        words = (
            "the model or a file has changed since this run was trained: model." if retrained else "not measured yet"
        )
        assert all(given[key].startswith(words) for key in expected), given
        file.write_bytes(before)
    assert call(*comparison.words("-q", "--report-only")).code == 0
    for name in ("README.md", "model/README.md", "out/none/seed-0/adapter/README.md"):
        (tmp_path / name).write_text("nothing that is measured with")
    assert call(*comparison.words("-q", "--report-only")).code == 0
    assert len(trained) == 2


def test_other_pairs_are_another_margin(copied, call, monkeypatch):
    from dataclasses import replace

    from safelora_fast.compare.measures import margin

    first, *others = margin.builtin_pairs()
    monkeypatch.setattr(margin, "builtin_pairs", lambda: [replace(first, question="Quite another one?"), *others])
    call(*copied.words("-q", "--report-only"))
    assert by_name(copied, "margin_rise", "learned") == ["not measured yet", None]


def test_another_base_is_another_sweep(copied, made, call):
    assert call(*copied.words("-q", "--report-only")).code == 0
    assert copied.report()["sweep"]
    base = made.path.parent / "base"
    file = base / "model.safetensors"
    before = file.read_bytes()
    replace_weights(base)
    try:
        call(*copied.words("-q", "--report-only"))
    finally:
        file.write_bytes(before)
    assert not copied.report()["sweep"]
    assert by_name(copied, "margin_rise") == [None]


def without_inputs(comparison, folder):
    """Leave what a repository would hold: the configuration and the JSON records, no adapter, model or data."""
    for file in comparison.output.rglob("*"):
        if file.is_file() and file.name not in {"compare.yaml", "safelora_train.json"} and "adapter" in str(file):
            file.unlink()
    hidden = folder.with_name("hidden")
    folder.rename(hidden)
    return hidden


@pytest.fixture
def recorded(tmp_path, trained, call, monkeypatch):
    """A small finished comparison in a folder of its own, whose inputs a test may take away."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    inputs = write_comparison(tmp_path / "inputs")
    measure = {name: inputs.values()["measure"][name] for name in ("narrow", "general", "scaled", "device")}
    comparison = TinyComparison(tmp_path / "compare.yaml", tmp_path / "out")
    inputs.path.rename(comparison.path)
    comparison.edit(measure=measure, output=str(comparison.output))
    assert call(*comparison.words("-q")).code == 0
    trained.clear()
    return comparison


def test_records_alone_give_the_same_report_without_model_data_or_adapters(recorded, tmp_path, call):
    before = (recorded.output / "report.html").read_bytes()
    without_inputs(recorded, tmp_path / "inputs")
    assert not list(recorded.output.rglob("*.safetensors"))
    for name in ("report.html", "report.md", "report.json"):
        (recorded.output / name).unlink()
    result = call(*recorded.words("-q", "--report-only"))
    assert result.code == 0, result.err
    assert (recorded.output / "report.html").read_bytes() == before


def test_a_new_checkout_trains_only_what_a_missing_measurement_needs(recorded, tmp_path, trained, call):
    without_inputs(recorded, tmp_path / "inputs").rename(tmp_path / "inputs")
    report = recorded.report()
    assert call(*recorded.words("-q")).code == 0
    assert (trained, recorded.report()) == ([], report)
    (recorded.output / "kl" / "seed-1" / "drift.json").unlink()
    recorded.edit(seeds=[0, 1, 2])
    assert call(*recorded.words("-q")).code == 0
    assert sorted(path.rpartition("/out/")[2] for path in trained) == [
        "kl/seed-1/recipe.yaml", "kl/seed-2/recipe.yaml", "none/seed-2/recipe.yaml",
    ]  # fmt: skip
    assert (
        recorded.cells("KL")["learned"]["seeds"][:2]
        == next(row for row in report["rows"] if row["name"] == "KL")["cells"]["learned"]["seeds"]
    ), "the same recipe gives the same adapter"


def test_measurements_of_an_adapter_that_the_record_does_not_name_are_ignored(recorded, tmp_path, call):
    without_inputs(recorded, tmp_path / "inputs")
    record = recorded.output / "kl" / "seed-1" / "adapter" / "safelora_train.json"
    whole = json.loads(record.read_text())
    for content, reason in (
        ({**whole, "adapter_sha256": "0" * 64}, "not measured yet"),
        ({name: value for name, value in whole.items() if name != "adapter_sha256"}, train_runs.DAMAGED),
        ({**whole, "finished": False}, "not trained yet"),
    ):
        record.write_text(json.dumps(content))
        assert call(*recorded.words("-q", "--report-only")).code == 1
        assert reasons(recorded, "KL", "learned") == [None, reason]
    record.write_text(json.dumps(whole))
    weigh(recorded, 9.0)
    assert call(*recorded.words("-q", "--report-only")).code == 1
    assert reasons(recorded, "KL", "learned") == [CHANGED] * 2, "another recipe is another run, with or without weights"
