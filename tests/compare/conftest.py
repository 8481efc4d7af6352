"""Fixtures of the comparison tests: a finished comparison, and the command line run in this process."""

from __future__ import annotations

import shutil

import pytest
from command_line import call
from tiny_comparison import TinyComparison, copy_comparison, train_inside, write_comparison

__all__ = ["call"]


@pytest.fixture(scope="package")
def made(tmp_path_factory):
    """A finished comparison; a test that changes it must copy it first."""
    from safelora_fast.compare.compare import compare
    from safelora_fast.compare.config import load_config

    with pytest.MonkeyPatch.context() as patch:
        train_inside(patch)
        comparison = write_comparison(tmp_path_factory.mktemp("compare"))
        compare(load_config(comparison.path), talk=False)
    return comparison


@pytest.fixture
def trained(monkeypatch):
    """The list of trained recipes; trainings run in this process."""
    return train_inside(monkeypatch)


@pytest.fixture
def copied(made, tmp_path, monkeypatch):
    """A copy of the finished comparison in another folder."""
    monkeypatch.chdir(tmp_path)
    return copy_comparison(made, tmp_path)


@pytest.fixture
def unmeasured(copied):
    """The undefended run of the finished comparison, trained with two seeds and not measured."""
    for file in [*copied.output.glob("reference/*"), *copied.output.glob("none/seed-*/*.json")]:
        file.unlink()
    shutil.rmtree(copied.output / "kl")
    copied.edit(runs={"none": {}}, measure={"margin": False, "device": "cpu"})
    return copied


@pytest.fixture
def move(monkeypatch):
    """A function that moves a comparison to another folder, and deletes some of its files."""

    def move_comparison(comparison, *gone):
        elsewhere = comparison.path.parent / "elsewhere"
        shutil.move(comparison.output, elsewhere)
        comparison.edit(output=str(elsewhere))
        monkeypatch.chdir(comparison.path.parent)
        for file in (file for name in gone for file in elsewhere.rglob(name)):
            file.unlink()
        return TinyComparison(comparison.path, elsewhere)

    return move_comparison
