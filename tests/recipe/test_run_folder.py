"""The output folder of a run: sealed checkpoints, records, and the rules for overwriting."""

from __future__ import annotations

import hashlib
import json

import pytest
from tiny_recipe import write_recipe

from safelora_fast.errors import OutputError, SettingsError
from safelora_fast.files.output import whole_folder
from safelora_fast.recipe.recipe import load_recipe
from safelora_fast.recipe.run_folder import RECORD, SEAL, RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(load_recipe(write_recipe(tmp_path).path))


def begin(folder, *, anew=True, **record):
    folder.begin({"recipe": folder.recipe.resolved(), "data": {"train": "abc"}} | record, anew=anew)


def checkpoint(folder, step):
    path = folder.path / "checkpoints" / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_text("w")
    return path


def test_only_sealed_checkpoints_count(folder):
    begin(folder)
    assert folder.last_checkpoint() is None
    for step in (2, 10, 4):
        checkpoint(folder, step)
        folder.seal(step, 1.5 * step)
    broken = checkpoint(folder, 12)
    for content in (None, "{", "[]", '{"step": "x", "seconds": 1}', '{"step": 12}'):
        if content is not None:
            (broken / SEAL).write_text(content)
        last = folder.last_checkpoint()
        assert (last.step, last.seconds, last.path.name) == (10, 15.0, "checkpoint-10")
    folder.seal(12, 18.0)
    for content in ("{", '{"global_step": "12", "log_history": []}', "[" * 10_000):
        (broken / "trainer_state.json").write_text(content)
        assert folder.last_checkpoint().step == 10
    (broken / "trainer_state.json").write_text('{"global_step": 12, "log_history": []}')
    assert folder.last_checkpoint().step == 12
    (broken / SEAL).unlink()
    begin(folder, anew=False)
    assert not broken.exists()
    assert folder.last_checkpoint().step == 10


def test_beginning_anew_removes_the_earlier_run(folder):
    begin(folder)
    checkpoint(folder, 2)
    folder.seal(2, 1.0)
    begin(folder)
    assert folder.last_checkpoint() is None
    assert folder.read_record()["finished"] is False
    assert [path.name for path in folder.path.parent.iterdir() if path.name.startswith(".")] == []


def test_what_may_be_written_over(folder):
    folder.check(resume=False, overwrite=False)
    folder.path.mkdir()
    folder.check(resume=False, overwrite=False)
    (folder.path / "thesis.txt").write_text("mine")
    for resume, overwrite in ((False, False), (True, False), (False, True)):
        with pytest.raises(OutputError, match="holds files that are not of a training run"):
            folder.check(resume=resume, overwrite=overwrite)
    (folder.path / "thesis.txt").unlink()
    begin(folder)
    with pytest.raises(OutputError, match="pass --resume to go on with it, --overwrite to start anew"):
        folder.check(resume=False, overwrite=False)
    folder.check(resume=True, overwrite=False)
    folder.check(resume=False, overwrite=True)
    with pytest.raises(SettingsError, match="pass one of them"):
        folder.check(resume=True, overwrite=True)
    with pytest.raises(OutputError, match="bytes are needed"):
        folder.check(resume=True, overwrite=False, nbytes=1 << 62)


@pytest.mark.parametrize("inside", ["model", "rows.jsonl", "recipe.yaml", "."])
def test_the_output_must_not_hold_or_be_an_input(tmp_path, inside):
    tiny = write_recipe(tmp_path, output={"folder": str(tmp_path / inside)})
    with pytest.raises(OutputError, match=r"must not contain one another|is not a folder"):
        RunFolder(load_recipe(tiny.path)).check(resume=False, overwrite=True)


def test_a_changed_recipe_is_named(folder, tmp_path):
    begin(folder)
    tiny = tmp_path / "recipe.yaml"
    changed = RunFolder(load_recipe(tiny, ["defenses.kl.weight=0.7", "training.seed=3", "lora.r=8"]))
    with pytest.raises(SettingsError) as refused:
        changed.check(resume=True, overwrite=False)
    for words in ("defenses.kl.weight was 0.5, is 0.7", "training.seed was 0, is 3", "lora.r was 4, is 8"):
        assert words in str(refused.value)
    six = [
        "model.dtype=bfloat16",
        "model.attention=eager",
        "lora.r=1",
        "lora.lora_alpha=1",
        "training.seed=1",
        "data.max_rows=3",
    ]
    changed = RunFolder(load_recipe(tiny, six))
    with pytest.raises(SettingsError, match="and 2 more"):
        changed.check(resume=True, overwrite=False)
    with pytest.raises(SettingsError, match=r"the data has changed: train was 'abc', is 'abd'"):
        folder.compare({"train": "abd"}, "data")
    moved = tmp_path / "moved"
    folder.path.rename(moved)
    RunFolder(load_recipe(tiny, [f"output.folder={moved}"])).check(resume=True, overwrite=False)


def test_data_that_lie_elsewhere_are_the_same_data(folder, tmp_path):
    rows, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    begin(folder, data={"train": hashlib.sha256(rows.read_bytes()).hexdigest()})
    other.write_bytes(rows.read_bytes())
    moved = RunFolder(load_recipe(tmp_path / "recipe.yaml", [f"data.path={other}"]))
    moved.check(resume=True, overwrite=False)
    other.write_text(other.read_text() + "\n")
    with pytest.raises(SettingsError, match=r"the recipe has changed: data\.path was"):
        moved.check(resume=True, overwrite=False)


def test_a_run_that_was_killed_before_its_first_record_can_be_begun(folder, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_words):
        raise Killed

    monkeypatch.setattr("safelora_fast.recipe.run_folder.write_json", kill)
    with pytest.raises(Killed):
        begin(folder)
    (folder.path / f".{RECORD}.123.partial").write_text("{")
    monkeypatch.undo()
    folder.check(resume=True, overwrite=False)
    begin(folder)
    assert folder.read_record()["finished"] is False


def test_records_that_are_none(folder):
    begin(folder)
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "must be an object"),
        (json.dumps({"format": 99}), "format 1"),
    ):
        (folder.path / RECORD).write_text(content)
        with pytest.raises(OutputError, match=message):
            folder.read_record()


def test_a_finished_folder_keeps_what_lay_in_it(tmp_path):
    target = tmp_path / "run"
    (target / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (target / "checkpoints" / "checkpoint-2" / "weights").write_text("w")
    (target / "record").write_text("before")
    with whole_folder(target, overwrite=True, keep_others=True) as partial:
        (partial / "record").write_text("after")
        (partial / "adapter").write_text("a")
        assert (target / "record").read_text() == "before"
    assert (target / "record").read_text() == "after"
    assert (target / "checkpoints" / "checkpoint-2" / "weights").read_text() == "w"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    with pytest.raises(ZeroDivisionError), whole_folder(target, overwrite=True, keep_others=True) as partial:
        (partial / "record").write_text(str(1 / 0))
    assert sorted(path.name for path in target.iterdir()) == ["adapter", "checkpoints", "record"]
    assert (target / "record").read_text() == "after"
