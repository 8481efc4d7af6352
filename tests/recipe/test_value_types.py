"""Values against annotations, as types and as source text."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from safelora_fast.recipe.value_types import Unknown, conforms, describe, read_annotation


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("float", [1.5, 1, -2], ["1.5", True, None, [1.0]]),
        ("int", [3], [3.0, True, "3"]),
        ("bool", [True], [1, "true", None]),
        ("str", ["a", ""], [1, None]),
        ("float | None", [None, 1], ["a", False]),
        ("Optional[Union[dict[str, Any], str]]", [None, {"a": 1}, "a"], [1, ["a"]]),
        ('Literal["all", "completion"]', ["all"], ["none", None, 1]),
        ("Literal[1, True]", [1, True], ["1", 2]),
        ("list[str]", [["a"], []], ["a", [1], None]),
        ("int | str | Sequence[int]", [5, "every:2", [1, 2]], [1.5, [1.5], True]),
        ("dict[str, int]", [{"a": 1}], [{"a": "b"}, [1]]),
        ("SchedulerType | str", ["linear"], [1.5, None, {"a": 1}]),
        ("typing.Optional[ParallelismConfig]", [None, {"a": 1}], []),
        ("torch.dtype", ["anything", 1], []),
        ("this is ( no annotation", ["anything"], []),
        (float | None, [None, 1], ["a"]),
        (Literal["a"], ["a"], ["b"]),
        (Any, [None, 1, "a"], []),
    ],
)
def test_conforms(annotation, good, bad):
    kind = read_annotation(annotation)
    for value in good:
        assert conforms(value, kind), value
    for value in bad:
        assert not conforms(value, kind), value


def test_names_of_the_module():
    assert read_annotation("Mode", {"Mode": Literal["x", "y"]}) == Literal["x", "y"]
    assert read_annotation("Mode") is Unknown


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ("float | None", "a number or null"),
        ("SchedulerType | str", "text"),
        ('Literal["a", "b"]', "one of a, b"),
        ("list[int]", "a list of a whole number"),
        ("Optional[bool]", "true or false or null"),
    ],
)
def test_describe(annotation, words):
    assert describe(read_annotation(annotation)) == words
