"""Fields read from a class's source code equal the fields of the imported class."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from safelora_fast.configuration import signatures
from safelora_fast.errors import MissingDependencyError
from safelora_fast.recipe.lora_and_trainer_sections import LORA, TRAINING


@pytest.mark.parametrize("section", [LORA, TRAINING], ids=lambda section: section.name)
def test_fields_are_those_of_the_class(section):
    cls = getattr(importlib.import_module(section.package), section.name)
    read = signatures._fields(section.package, section.name)
    assert set(read) == {field.name for field in dataclasses.fields(cls) if field.init}
    assert all(isinstance(annotation, str) for annotation in read.values())
    assert section.defaults.keys() <= read.keys()


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
