"""What calls from Python show: a bar on a terminal, and warnings through logging."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace

import pytest
from command_line import call
from plain_pair import write_pair

from safelora_fast import SafeSubspace, project_adapter
from safelora_fast.files import progress
from safelora_fast.files.progress import bar_on_a_terminal

__all__ = ["call"]


class Terminal(io.StringIO):
    """Standard error of a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def bars(monkeypatch):
    """Return the bars that are shown, each with the arguments that it received."""
    shown = []

    class Told(progress.ProgressBar):
        def __init__(self):
            super().__init__()
            shown.append(self)
            self.told = []

        def start(self, *facts):
            super().start(*facts)
            self.told.append(facts)

        def advance(self, done, *what):
            super().advance(done, *what)
            self.told.append(done)

    monkeypatch.setattr(progress, "ProgressBar", Told)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=Terminal()))
    return shown


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


def project(pair, **options):
    return project_adapter(pair.adapter, aligned=pair.aligned, base=pair.base, output=None, **options)


def test_a_bar_follows_the_bytes(pair, bars):
    report = project(pair)
    (bar,) = bars
    assert bar.told[0] == (report.bytes_read, 6)
    assert bar.told[-1] == report.bytes_read
    assert bar._bar is None
    SafeSubspace.build(aligned=pair.aligned, base=pair.base, rank=2)
    assert len(bars) == 2


def test_no_bar_where_none_is_wanted_or_nobody_looks(pair, bars, monkeypatch):
    project(pair, progress=False)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=io.StringIO()))
    project(pair)
    assert bars == []


def test_a_bar_where_one_is_wanted_although_nobody_looks(pair, bars, monkeypatch):
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=io.StringIO()))
    project(pair, progress=True)
    assert len(bars) == 1


def test_what_was_given_is_told(bars):
    given = object()
    with bar_on_a_terminal(given) as told:
        assert told is given
    assert bars == []


@pytest.mark.usefixtures("bars")
def test_other_kinds_of_counting():
    with bar_on_a_terminal(None) as told:
        told.start("answers", 8, 2)
        told.advance(5)
        assert told._bar.tasks[0].completed == 5
        told.start("activations", 4)
        assert [task.total for task in told._bar.tasks] == [4]
    with bar_on_a_terminal(None) as told:
        told(1, 3)
        told(2, 3)
        assert (told._bar.tasks[0].completed, told._bar.tasks[0].total) == (2, 3)


def test_warnings_are_logged_and_by_commands_printed_once(pair, call, caplog):
    with caplog.at_level(logging.WARNING, logger="safelora_fast"):
        report = project(pair)
        assert [record.getMessage() for record in caplog.records] == report.warnings != []
        caplog.clear()
        result = call("inspect", pair.adapter, "--aligned", pair.aligned, "--base", pair.base, "--quiet")
        assert result.err.count("warning: ") == len(report.warnings)
        assert caplog.records == []
        project(pair)
        assert len(caplog.records) == len(report.warnings)
