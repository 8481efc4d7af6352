"""The blocks of the documentation: Python runs, commands run or are parsed, YAML is checked by its reader.

A command is run if the page shows its output. Otherwise its options are parsed, because it would need a real model.
Pages with Python share a folder and names, as a reader would; `prepare` makes what the text says that the reader has.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex

import pytest
import yaml
from doc_blocks import ROOT, blocks, same_output
from typer.main import get_command

from safelora_fast.cli.app import app

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def of(*languages):
    found = [block for page in PAGES for block in blocks(page) if block.language in languages and not block.mark]
    return pytest.mark.parametrize("block", found, ids=str)


def commands(block):
    """Return the commands of a shell block as lists of words, without comments and joined over lines."""
    for line in block.text.replace("\\\n", " ").split("\n"):
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def parse(words):
    """Parse the words of a command without running it; raise as the command line would."""
    command = get_command(app)
    context = command.make_context("safelora-fast", list(words))
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, words, parent=context)


@of("bash")
def test_commands_are_known(block):
    for program, *words in commands(block):
        if program == "safelora-fast":
            parse([word for word in words if word not in {">", ">>"}])
        elif program == "make":
            assert set(words) <= TARGETS
        else:
            assert program in {"pip", "."}, f"{block}: {program} is not known here; mark the block"


@of("jsonl")
def test_jsonl_is_read(block):
    for line in block.text.splitlines():
        assert isinstance(json.loads(line), dict)


@of("yaml")
def test_yaml_is_accepted_by_its_reader(block, tmp_path, monkeypatch):
    from personas import save_persona
    from tiny_recipe import write_recipe, write_rows

    from safelora_fast.gate.policy import read_policy
    from safelora_fast.persona.trait import load_trait
    from safelora_fast.recipe.recipe import load_recipe
    from safelora_fast.trainers.defense_settings import KEY, read_settings

    values = yaml.safe_load(block.text)
    file = tmp_path / "block.yaml"
    file.write_text(block.text, "utf-8")
    if "criteria" in values:
        assert read_policy(file).criteria
    elif KEY in values:
        assert read_settings(file, key=KEY).defenses
    elif "pairs" in values:
        assert load_trait(file).questions
    else:
        monkeypatch.chdir(tmp_path)
        for name in ("train.jsonl", "task.jsonl", "safe.jsonl", "my-pairs.jsonl"):
            write_rows(tmp_path / name, [{"prompt": "a", "completion": "b"}])
        save_persona(tmp_path / "malicious.safetensors")
        recipe = write_recipe(tmp_path, **values)
        assert load_recipe(recipe.path)


def with_code(page):
    return any((b.language == "python" or b.output is not None) and not b.mark for b in blocks(page))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets it
@pytest.mark.parametrize(
    "page", [page for page in PAGES if with_code(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_code_runs(page, prepare, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    names = prepare(page)
    for block in blocks(page):
        shown = ""
        if block.mark or block.language not in {"python", "bash"}:
            continue
        if block.language == "python":
            code = compile("\n" * block.line + block.text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(code, names)
            shown = stream.getvalue()
        elif block.output is not None:
            for program, *words in commands(block):
                assert program == "safelora-fast"
                result = call(*words)
                shown += result.err + result.out
        if block.output is not None:
            assert same_output(block.output, shown), f"{block} shows\n{shown}"
