"""The files of a release agree: one version everywhere, and workflows whose actions are pinned and may do little."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def first(pattern, file):
    return re.search(pattern, (ROOT / file).read_text("utf-8"), re.MULTILINE)[1]


def test_one_version_everywhere():
    version = first(r'^version = "([\d.]+)"', "Cargo.toml")
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert first(r"^version: (.+)", "CITATION.cff") == version
    assert first(r"^## ([\d.]+) \(", "CHANGELOG.md") == version
    assert first(r"fixes: ([\d.]+) today", "SECURITY.md") == version.rpartition(".")[0]
    for lock in ("Cargo.lock", "rust/core/fuzz/Cargo.lock"):
        assert first(r'^name = "safelora-fast-core"\nversion = "(.+)"', lock) == version


def test_the_date_of_the_newest_version_is_the_same_twice():
    assert first(r"^## [\d.]+ \((.+)\)", "CHANGELOG.md") == first(r'^date-released: "(.+)"', "CITATION.cff")


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_are_pinned_and_may_do_little(file):
    text = file.read_text("utf-8")
    used = re.findall(r"uses: (.+)", text)
    assert used
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action) for action in used)
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {}
    assert {job["timeout-minutes"] <= 90 for job in workflow["jobs"].values()} == {True}
    granted = [scope for job in workflow["jobs"].values() for scope in job.get("permissions", {}).items()]
    assert set(granted) <= {("contents", "read"), ("id-token", "write")}
    assert granted.count(("id-token", "write")) == (file.stem == "release")
    assert "secrets." not in text


def test_workflows_run_what_is_there():
    for file in WORKFLOWS:
        for command in re.findall(r"run: (?:make|bash|python) (\S+)", file.read_text("utf-8")):
            there = (ROOT / command).is_file() or re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.M)
            assert there, f"{file.name}: {command}"
