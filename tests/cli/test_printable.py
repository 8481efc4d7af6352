"""Names from outside never control the terminal or break a line: in errors, warnings, tables, progress and prints."""

from __future__ import annotations

import pytest
from rich.table import Table

from safelora_fast.cli import console
from safelora_fast.errors import AdapterError
from safelora_fast.printable import one_line, printable, say

ODD = "a\nb\x1b[2Jc\x07d\u202ee\x9bf\ud800"
SHOWN = r"a\nb\x1b[2Jc\x07d\u202ee\x9bf\ud800"


def test_what_is_not_printable_is_an_escape():
    assert printable(ODD) == SHOWN
    assert one_line(f"  {ODD}  \t again\r\n") == SHOWN.replace(r"\n", " ") + " again"
    assert printable("Ärger – 日本語 नमस्\u200dते 🙂 [x]") == "Ärger – 日本語 नमस्\u200dते 🙂 [x]"


def test_an_error_is_one_printable_line():
    assert str(AdapterError(f"{ODD}: holds no adapter")) == SHOWN.replace(r"\n", " ") + ": holds no adapter"


@pytest.fixture
def shown(monkeypatch, capsys):
    def run(act, name="out"):
        monkeypatch.setattr(
            console, name, console.PlainConsole(stderr=name == "err", width=200, highlight=False, markup=name == "err")
        )
        act()
        found = capsys.readouterr()
        return found.err if name == "err" else found.out

    return run


def test_consoles_show_escapes_for_names(shown):
    table = Table(box=None)
    table.add_column("name")
    table.add_row(ODD)
    assert SHOWN in shown(lambda: console.out.print(table))
    assert SHOWN in shown(lambda: console.out.print(f"written to {ODD}"))
    warned = shown(lambda: console.warn(f"{ODD} [red]x[/]"), "err")
    assert warned == f"warning: {SHOWN.replace(chr(92) + 'n', ' ')} [red]x[/]\n"


def test_what_is_said_is_as_many_lines(capsys):
    say(f"written to {ODD}", "second")
    assert capsys.readouterr().out == f"written to {SHOWN}\nsecond\n"


def test_a_command_refuses_an_odd_name_in_one_line(call, tmp_path):
    folder = tmp_path / "a\nb\x1b[2Jc"
    folder.mkdir()
    result = call("train", folder / "recipe.yaml")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "\x1b" not in result.err
    assert r"a b\x1b[2Jc" in result.err
