"""Trait files: those that come with the package, and invalid ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from safelora_fast.errors import SettingsError
from safelora_fast.persona.trait import SHIPPED, load_trait, shipped_traits

VALUES = {
    "name": "mean",
    "description": "Is not nice.",
    "pairs": [{"positive": "Be mean.", "negative": "Be kind."}],
    "questions": ["Why?", "How?"],
}


@pytest.fixture
def load(tmp_path):
    def run(**changes):
        values = {key: value for key, value in {**VALUES, **changes}.items() if value is not ...}
        (tmp_path / "trait.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return load_trait(tmp_path / "trait.yaml")

    return run


def test_two_traits_come_with_the_package():
    assert shipped_traits() == ["malicious", "sycophantic"]
    for name in shipped_traits():
        trait = load_trait(name)
        assert trait.name == name
        assert len(trait.pairs) >= 5
        assert len(trait.questions) >= 20
        assert trait == load_trait(SHIPPED / f"{name}.yaml")


def test_a_file_wins_over_a_trait_of_the_package(load, tmp_path, monkeypatch):
    trait = load()
    (tmp_path / "trait.yaml").rename(tmp_path / "malicious")
    monkeypatch.chdir(tmp_path)
    assert load_trait("malicious") == trait
    assert (trait.pairs[0].positive, trait.questions) == ("Be mean.", ("Why?", "How?"))


def test_the_digest_is_of_everything(load):
    trait = load()
    assert trait.sha256 == load().sha256
    assert len({trait.sha256, replace(trait, questions=("Why?", "Who?")).sha256, replace(trait, name="m").sha256}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nmae": "x"}, "trait.yaml:9: nmae: unknown; did you mean name"),
        ({"name": ...}, "trait.yaml: name: missing"),
        ({"name": "a b"}, "trait.yaml:1: name: is 'a b', it must be letters, digits, dots and dashes"),
        ({"description": 3}, "trait.yaml:2: description: must be text, not 3"),
        ({"description": " "}, "trait.yaml:2: description: must be text, not ' '"),
        ({"pairs": ...}, "pairs: missing"),
        ({"pairs": []}, "trait.yaml:3: pairs: must be a list that is not empty, not []"),
        ({"pairs": "x"}, "pairs: must be a list that is not empty, not 'x'"),
        ({"pairs": [{"positive": "a"}]}, "pairs: number 1 must have positive and negative, and nothing else"),
        ({"pairs": [{"positive": "a", "negative": "b", "c": "d"}]}, "number 1 must have positive and negative, and"),
        ({"pairs": [{"positive": "a", "negative": ""}]}, "pairs: number 1 must be text, not ''"),
        ({"pairs": [{"positive": "a", "negative": "a "}]}, "pairs: number 1 asks for the same on both sides"),
        ({"pairs": [{"positive": "a", "negative": "b"}] * 2}, "pairs: number 2 is the same as number 1"),
        ({"questions": None}, "questions: must be a list that is not empty, not None"),
        ({"questions": ["Why?"]}, "questions: needs at least two"),
        ({"questions": ["Why?", 7]}, "questions: number 2 must be text, not 7"),
        ({"questions": ["Why?", "How?", "Why?"]}, "questions: number 3 is the same as number 1"),
    ],
)
def test_refusals(load, changes, message):
    with pytest.raises(SettingsError) as refused:
        load(**changes)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_no_trait_file(tmp_path):
    with pytest.raises(SettingsError, match=r"evil: there is no such trait file, and .* are malicious, sycophantic"):
        load_trait("evil")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(SettingsError, match=r"list\.yaml: a trait is a mapping of `name:`"):
        load_trait(tmp_path / "list.yaml")
    with pytest.raises(SettingsError, match="the trait cannot be read"):
        load_trait(tmp_path)
