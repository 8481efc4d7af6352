"""What is said beside the figures of a comparison."""

from __future__ import annotations

from types import SimpleNamespace

from safelora_fast.compare.notes import facts_of


def test_no_path_of_the_machine_is_published():
    config = SimpleNamespace(
        recipe={"data": {"path": "/home/somebody/rows.jsonl"}},
        seeds=(0, 1),
        measure=SimpleNamespace(operator_swap=None, judge=None, sweep=SimpleNamespace(base="some-org/base")),
    )
    bench = SimpleNamespace(
        settings=SimpleNamespace(model="/home/somebody/models/tiny", dtype="float32", device="cpu"),
        rows={"narrow": SimpleNamespace(rows=[0] * 3, source="/home/somebody/narrow.jsonl")},
    )
    facts = facts_of(config, bench, [])
    assert (facts["model"], facts["task"], facts["SafeLoRA's base"]) == ("tiny", "rows.jsonl", "some-org/base")
    assert facts["narrow rows"] == "3 of narrow.jsonl"
    assert not any("/home" in text for text in facts.values())
