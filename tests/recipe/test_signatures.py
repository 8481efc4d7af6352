"""Fields read from the source of a class are those of the class."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys

import pytest

from safelora_fast.errors import MissingDependencyError
from safelora_fast.recipe import signatures
from safelora_fast.recipe.lora_and_trainer_sections import LORA, TRAINING


@pytest.mark.parametrize("section", [LORA, TRAINING], ids=lambda section: section.name)
def test_fields_are_those_of_the_class(section):
    cls = getattr(importlib.import_module(section.package), section.name)
    read = signatures._fields(section.package, section.name)
    assert set(read) == {field.name for field in dataclasses.fields(cls) if field.init}
    assert all(isinstance(annotation, str) for annotation in read.values())
    assert section.defaults.keys() <= read.keys()


def test_nothing_is_imported():
    program = (
        "import sys; from safelora_fast.recipe.signatures import _fields; "
        "print(len(_fields('trl', 'SFTConfig')) > 100, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]


def test_where_the_source_does_not_tell_the_class_is_imported(monkeypatch):
    expected = {field.name for field in dataclasses.fields(importlib.import_module("peft").LoraConfig) if field.init}

    def lost(_module, _name):
        raise signatures._NotFoundError

    monkeypatch.setattr(signatures, "_fields", lost)
    assert set(signatures.dataclass_fields.__wrapped__("peft", "LoraConfig")) == expected


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(signatures, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(MissingDependencyError, match=r"no_such_package: pip install .*'torch>="):
        signatures.check_packages()
