"""Module names of 0.1.0 can still be imported, and the warning gives the current name."""

from __future__ import annotations

import importlib

import pytest

from safelora_fast.former_modules import MOVED, PACKAGE, new_names


@pytest.mark.parametrize("former", MOVED)
def test_a_former_module_has_what_it_became(former):
    became = [importlib.import_module(name) for name in new_names(PACKAGE + former)]
    with pytest.warns(DeprecationWarning, match=f"{former} is .* now"):
        module = importlib.reload(importlib.import_module(PACKAGE + former))
    for one in became:
        for name in (name for name in vars(one) if not name.startswith("_")):
            assert any(getattr(module, name) is getattr(other, name, None) for other in became)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


def test_a_module_of_a_room_that_has_another_name():
    with pytest.warns(DeprecationWarning, match="evaluation.judge is safelora_fast.judging.judge now"):
        from safelora_fast.evaluation.judge import Judge
    from safelora_fast.judging.judge import Judge as Now

    assert Judge is Now


def test_what_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("safelora_fast.evaluation.nonsense")
