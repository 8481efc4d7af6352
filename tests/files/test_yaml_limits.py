"""YAML that expands to more than its file holds: every reader of YAML rejects it at once, with its line."""

from __future__ import annotations

import pytest

from safelora_fast.compare.config import load_config
from safelora_fast.configuration.yaml_document import read_document
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.files.yaml_reader import parse_yaml
from safelora_fast.judging.questions import read_questions
from safelora_fast.persona.trait import load_trait

LISTS = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))])
MERGES = "\n".join(
    ["a0: &a0 {k: v}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 30))]
)
CHAIN = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 60))])
FLOW = "a: " + "[" * 100_000
BLOCK = "\n".join(" " * depth + f"k{depth}:" for depth in range(300))
MANY = "a: [" + "1, " * 1500 + "]"
LARGE = "a: " + "x" * (1 << 22)
BOMBS = {
    "lists": (LISTS, ":6: more than 100,000 values, with every alias written out"),
    "merges": (MERGES, ":6: more than 100,000 values, with every alias written out"),
    "chain": (CHAIN, ": nested in more than 50 levels, with every alias written out"),
    "flow": (FLOW, ":1: this is not YAML: nested in more than 50 levels"),
    "block": (BLOCK, ":50: this is not YAML: nested in more than 50 levels"),
    "many": (MANY, ":1: this is not YAML: more than 1,000 values"),
    "large": (LARGE, ": has more than 4,194,304 characters"),
}
READERS = {"recipe": read_document, "comparison": load_config, "trait": load_trait, "questions": read_questions}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bomb", ["lists", "merges", "flow"])
def test_every_reader_refuses_at_once(tmp_path, reader, bomb):
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[bomb][0])
    with pytest.raises((SettingsError, DataError)) as refused:
        READERS[reader](path)
    assert "bomb.yaml:" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_is_said(bomb, monkeypatch):
    text, words = BOMBS[bomb]
    if bomb == "many":  # PyYAML needs seconds for the allowed number
        monkeypatch.setattr("safelora_fast.files.yaml_reader.MOST_NODES", 1000)
    with pytest.raises(SettingsError) as refused:
        parse_yaml(text, "here")
    assert words.removeprefix(":") in str(refused.value)
    if bomb != "chain":
        assert str(refused.value) == f"here{words}"


def test_overrides_have_the_limits_too(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("a: 1\n")
    for word, message in (
        (f"b={'[' * 2000}", "command line: b: this is not YAML: nested"),
        (f"{'b.' * 2000}c=1", "is not a setting"),
    ):
        with pytest.raises(SettingsError, match=message):
            read_document(path, [word])


def test_merges_as_yaml_has_them():
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc:\n  z: 3\n  <<: [*a, *b]\nd: {<<: *b, w: 4}\ne: {'<<': 5}\n"
    lines = {}
    values = parse_yaml(text, "here", lines)
    assert values["c"] == {"x": 1, "y": 1, "z": 3}
    assert values["d"] == {"y": 2, "z": 2, "w": 4}
    assert values["e"] == {"<<": 5}
    assert lines["c", "y"] == 1
    assert lines["c", "z"] == 4
    with pytest.raises(SettingsError, match="here:1: <<: takes a mapping"):
        parse_yaml("a: {<<: 3}", "here")
