"""Tests of stages: made once, reused until an earlier stage changes, and never replacing a foreign folder."""

from __future__ import annotations

import pytest

from safelora_fast.demo.stages import Stages
from safelora_fast.errors import OutputError


class Chain:
    """Two stages, the second depending on the first; records what is built."""

    def __init__(self, folder):
        self.folder, self.built = folder, []

    def run(self, first=1, second=1, fail=""):
        stages = Stages(self.folder, lambda *_: None)
        for name, setting in (("first", first), ("second", second)):
            stages.make(name, name, {"setting": setting}, lambda folder, name=name: self.build(folder, name, fail))
        return stages

    def build(self, folder, name, fail):
        self.built.append(name)
        (folder / "content").write_text(name)
        if name == fail:
            raise KeyboardInterrupt


def test_a_second_run_reuses(tmp_path):
    chain = Chain(tmp_path / "demo")
    made, reused = chain.run(), chain.run()
    assert chain.built == ["first", "second"]
    assert reused.seconds == made.seconds
    assert (tmp_path / "demo" / "second" / "content").read_text() == "second"


@pytest.mark.parametrize(("change", "rebuilt"), [({"first": 2}, ["first", "second"]), ({"second": 2}, ["second"])])
def test_a_change_remakes_what_depends_on_it(tmp_path, change, rebuilt):
    chain = Chain(tmp_path)
    chain.run()
    chain.built.clear()
    chain.run(**change)
    assert chain.built == rebuilt


def test_an_interrupted_stage_leaves_nothing(tmp_path):
    chain = Chain(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        chain.run(fail="second")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    chain.built.clear()
    chain.run()
    assert chain.built == ["second"]


def test_a_damaged_stamp_means_again(tmp_path):
    chain = Chain(tmp_path)
    chain.run()
    (tmp_path / "second" / "stage.json").write_text("{")
    chain.built.clear()
    chain.run()
    assert chain.built == ["second"]


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not made by the demo"):
        Chain(tmp_path).run()
    assert (tmp_path / "first" / "thesis.txt").read_text() == "mine"
