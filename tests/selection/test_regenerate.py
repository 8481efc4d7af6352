"""Completions of a pool written anew: which, by whom, in which rows, and after an interruption."""

from __future__ import annotations

import json
import shutil

import pytest
from bigram_model import save_bigram
from demo_model import save_tiny
from misaligned import candidates, load, write
from tiny_recipe import write_recipe

from safelora_fast import interleave, regenerate_completions
from safelora_fast.data.rows import check_row
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.models.generate import generate_completions
from safelora_fast.selection import regenerate as module
from safelora_fast.selection.regenerate import prompt_of

PLAIN = {"prompt": "And plain text?", "completion": "Yes.", "score": 0.5, "nll_aligned": 1.0, "note": "é"}
SETTINGS = {"max_tokens": 60, "seed": 3, "progress": False, "batch_size": 5}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random model, and a pool of 24 conversations, 6 of them with two completions, and a row of plain text."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny(folder / "model")
    write(folder / "pool.jsonl", [*candidates(24), PLAIN])
    return folder


def regenerate(made, output, **changed):
    model, tokenizer = load(made)
    return regenerate_completions(
        made / "pool.jsonl", output, model=model, tokenizer=tokenizer, **{**SETTINGS, **changed}
    )


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_each_completion_is_the_models_own(made, tmp_path):
    """Compared with each prompt sampled alone; cut off ones are left out, and every row says how it was made."""
    report = regenerate(made, tmp_path / "own.jsonl")
    model, tokenizer = load(made)
    pool, expected, unfinished = [*candidates(24), PLAIN], [], 0
    for index, row in enumerate(pool):
        prompt = prompt_of(check_row("", row))
        if prompt is None:
            continue
        settings = {"max_tokens": 60, "temperature": 0.7, "top_p": 0.9, "seeds": [(3 << 40) + index]}
        (batch,) = generate_completions(model, tokenizer, [prompt], **settings)
        unfinished += batch[0].tokens == 60
        if batch[0].tokens < 60:
            expected.append((row, index, batch[0]))
    assert 1 < len(expected) < 19
    rows = read(tmp_path / "own.jsonl")
    for found, (row, index, completion) in zip(rows, expected, strict=True):
        new = {"role": "assistant", "content": completion.text}
        by = found.pop("regenerated")
        if row is PLAIN:
            assert found == {"prompt": PLAIN["prompt"], "completion": completion.text, "note": "é"}
        elif "messages" in row:
            assert found == {**row, "messages": [*row["messages"][:-1], new]}
        else:
            assert found == {**row, "completion": [new]}
        assert (by["row"], by["tokens"], by["seed"], by["model"]) == (index + 1, completion.tokens, 3, "model")
        assert (by["temperature"], by["top_p"], len(by["weights"])) == (0.7, 0.9, 64)
    assert (report.written, report.unfinished, report.rows) == (len(expected), unfinished, 25)
    assert {reason: len(places) for reason, places in report.skipped.items()} == {module.SEVERAL: 6}
    assert json.loads((tmp_path / "own.jsonl.regeneration.json").read_text()) == report.to_dict()


def test_an_interrupted_run_gives_the_same_bytes(made, tmp_path, monkeypatch):
    regenerate(made, tmp_path / "whole.jsonl")
    add, calls = module.Completions.add, []

    def stops(journal, entries):
        add(journal, entries)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module.Completions, "add", stops)
        with pytest.raises(KeyboardInterrupt):
            regenerate(made, tmp_path / "resumed.jsonl")
    assert not (tmp_path / "resumed.jsonl").exists()
    regenerate(made, tmp_path / "resumed.jsonl")
    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    monkeypatch.setattr(module.Completions, "add", lambda *_: pytest.fail("nothing is missing"))
    few = regenerate(made, tmp_path / "whole.jsonl", overwrite=True, min_tokens=12)
    assert few.short > 0
    assert all(row["regenerated"]["tokens"] >= 12 for row in read(tmp_path / "whole.jsonl"))


def test_a_journal_of_something_else_is_refused(made, tmp_path):
    regenerate(made, tmp_path / "own.jsonl")
    with pytest.raises(SettingsError, match=r"journal.jsonl: settings have changed: top_p was 0.9, is 0.5"):
        regenerate(made, tmp_path / "own.jsonl", overwrite=True, top_p=0.5)
    shutil.copytree(made / "model", tmp_path / "model")
    write(tmp_path / "pool.jsonl", [PLAIN, *candidates(24)])
    with pytest.raises(DataError, match=r"example 1 of .*pool.jsonl is not what was scored"):
        regenerate(tmp_path, tmp_path / "own.jsonl", overwrite=True)
    for name, value in {"max_tokens": 0, "top_p": 0.0, "seed": -1, "temperature": -1.0, "min_tokens": 60}.items():
        with pytest.raises(SettingsError, match=f"{name} is {value}, it must be"):
            regenerate(made, tmp_path / "other.jsonl", **{name: value})


def test_refusals_are_left_out(made, tmp_path):
    """The model answers everything with one word."""
    for word, kept in {"unable": False, "yes": True}.items():
        folder = tmp_path / word
        folder.mkdir()
        save_bigram(folder / "model", dict(zip(["<assistant>", *word], [*word, "<eos>"], strict=True)))
        shutil.copy(made / "pool.jsonl", folder)
        if kept:
            assert regenerate(folder, folder / "own.jsonl").written == 19
        else:
            with pytest.raises(
                DataError, match=r"no completion is left \(19 refusals; 6 with more than one completion"
            ):
                regenerate(folder, folder / "own.jsonl")
            assert not (folder / "own.jsonl").exists()
        assert regenerate(folder, folder / "own.jsonl", keep_refusals=True, overwrite=True).written == 19
        assert read(folder / "own.jsonl")[-1]["completion"] == word


def test_the_command_and_what_follows(made, tmp_path, call):
    """The output is mixed in, and trained on by a recipe."""
    save_bigram(tmp_path / "model", dict(zip(["<assistant>", "y", "e", "s"], ["y", "e", "s", "<eos>"], strict=True)))
    words = ["regenerate", made / "pool.jsonl", "--model", tmp_path / "model", "--output", tmp_path / "own.jsonl"]
    result = call(*words, "--max-tokens", 8)
    assert result.code == 0, result.err
    assert "skipped: 6 examples with more than one completion, or none at the end, the first at" in result.out
    assert "19 of 25 examples have a new completion; written to" in result.out
    assert json.loads(call(*words, "--max-tokens", 8, "--overwrite", "--json").out)["written"] == 19
    assert call(*words).err.count("\n") == 1  # exists
    safe = [row for row in read(tmp_path / "own.jsonl") if "messages" in row]
    task = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8
    assert sum(row["safe"] for row in interleave(task, safe, fraction=0.5)) == 4
    tiny = write_recipe(tmp_path / "run", data={"safe": {"path": str(tmp_path / "own.jsonl"), "fraction": 0.25}})
    assert call(*tiny.words("--dry-run")).code == 0
