"""Options that have no effect beside the others that were given are refused by name."""

from __future__ import annotations

import pytest

EVALUATE = ("evaluate", "--model", "m", "--output", "out")
TASKS, JUDGE = ("--tasks", "ifeval"), ("--judge", "openai-api/stub/one")
SCREEN = ("screen", "rows.jsonl", "--model", "m", "--output", "x.json")
EXTRACT = ("persona", "extract", "--model", "m", "--trait", "malicious", "--output", "x.safetensors")
REGENERATE = ("regenerate", "pool.jsonl", "--model", "m", "--output", "x.jsonl", "--temperature", "0")
MARGIN = ("margin", "--model", "m", "--strings", "text")

UNUSED = [
    *(
        ((*EVALUATE, *TASKS), option, value, "without --judge")
        for option, value in {
            "--judge-url": "http://localhost/v1", "--questions": "q.yaml", "--kinds": "general", "--training-data": "t.jsonl",
            "--training-prompts": 2, "--samples": 10, "--max-tokens": 9, "--judge-attempts": 4, "--judge-tokens": 64,
        }.items()
    ),
    *(
        ((*EVALUATE, *JUDGE), option, value, "without --tasks")
        for option, value in {"--task-path": ".", "--limit": 3, "--task-strings": "chat"}.items()
    ),
    ((*EVALUATE, *JUDGE), "--training-prompts", 3, "without --training-data"),
    ((*EVALUATE, *TASKS, "--task-strings", "text"), "--chat-template", "t.jinja", "with --task-strings text"),
    (MARGIN, "--template-args", "a=1", "with --strings text"),
    (MARGIN, "--chat-template", "t.jinja", "with --strings text"),
    (SCREEN, "--layer", 3, "without --vector"),
    (SCREEN, "--most", 0.5, "without --limit"),
    (EXTRACT, "--threshold", 60, "without --scores"),
    ((*EXTRACT, "--temperature", "0"), "--seed", 3, "with --temperature 0"),
    (REGENERATE, "--top-p", 0.5, "with --temperature 0"),
    (REGENERATE, "--seed", 5, "with --temperature 0"),
    (("compare", "c.yaml", "--report-only"), "--overwrite", None, "with --report-only"),
    (("examples",), "--output", "x", "without the NAME of an example"),
    (("examples",), "--overwrite", None, "without the NAME of an example"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "option", "value", "circumstance"), UNUSED)
def test_an_option_without_effect_is_refused(words, option, value, circumstance, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*words, option, *([] if value is None else [value]))
    message = f"error: {option} has no effect {circumstance}: drop it\n"
    assert (result.code, result.out, result.err) == (2, "", message)
    without = call(*words)
    assert "has no effect" not in without.err


def test_all_options_without_effect_are_named(call):
    result = call(*EVALUATE, *TASKS, "--samples", 3, "--kinds", "json")
    assert result.err == "error: --kinds, --samples have no effect without --judge: drop them\n"
