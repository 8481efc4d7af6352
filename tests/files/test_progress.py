"""The progress bar without a terminal: which lines it prints, and when."""

from __future__ import annotations

import pytest

from safelora_fast.files import progress
from safelora_fast.files.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by a fixed step each time it is read."""

    class Clock:
        now = 0.0
        step = 6.0

        def monotonic(self):
            self.now += self.step
            return self.now

    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def count(bar):
    bar.start("answers", 12, 2)
    for done in (4, 6, 12):
        bar.advance(done)


def count_bytes(bar):
    bar.start(10**12, 3)
    for done in (1, 2, 3):
        bar.advance(done * 10**11, f"layer.{done}\x1b[31m")


def call(bar):
    for done in (0, 3, 6, 8):
        bar(done, 8)
        bar.annotate("loss 1.5")


@pytest.mark.parametrize(
    ("work", "lines"),
    [
        (count, ["answers: 2 of 12 are there already", "answers: 6 of 12, 3 s each, 18 s left",
                 "answers: 12 of 12, 1.8 s each"]),
        (count_bytes, ["layer.2\\x1b[31m: 20%, 16.67 GB/s, 48 s left"]),
        (call, ["rows: 3 of 8, 4 s each, 20 s left: loss 1.5", "rows: 8 of 8, 3 s each: loss 1.5"]),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("clock")
def test_a_line_every_ten_seconds(capsys, work, lines):
    with ProgressBar() as bar:
        work(bar)
    assert capsys.readouterr().err.splitlines() == lines
    with ProgressBar(wanted=False) as bar:
        work(bar)
    assert capsys.readouterr() == ("", "")


def test_short_work(clock, capsys):
    clock.step = 0.5
    with ProgressBar(brief=True) as bar:
        bar.start("answers", 8)
        bar.advance(8)
    with ProgressBar() as bar:
        bar.start("pairs", 8)
        bar.advance(8)
    assert capsys.readouterr().err == "pairs: 8 of 8, 16 a second\n"
