"""Rules of the documentation: short pages, short lines, links that lead somewhere, blocks that run or say why not."""

from __future__ import annotations

import re

import pytest
from doc_blocks import ROOT, blocks

import safelora_fast
from safelora_fast import ops

DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md"))]
PAGES += [page for page in sorted(DOCS.rglob("*.md")) if page.name != "report.md"]  # what `compare` writes
LINK = re.compile(r"\]\(([^)\s]+)\)")
RUN = {"python", "bash", "yaml", "jsonl"}  # test_blocks.py runs or checks these
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page):
    return re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """Return the ids of a page's headings: lower case, punctuation gone, spaces as dashes."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@every_page
def test_a_page_is_short(page):
    text = page.read_text("utf-8")
    assert len(text.split()) <= (1000 if page == ROOT / "README.md" else 1500)
    # a link's target cannot be broken
    assert [line for line in text.split("\n") if len(LINK.sub("]", line)) > 120] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_pages_and_headings(page):
    for link in LINK.findall(prose(page)):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert target.is_relative_to(DOCS) or not page.is_relative_to(DOCS), f"{link} is not on the site"
            assert not anchor or anchor in anchors(target), link


@every_page
def test_each_block_runs_or_says_why_not(page):
    for block in blocks(page):
        assert block.mark or block.language in RUN | {"text"}, f"{block}: say <!-- not run: why --> above it"
        if block.mark and block.mark[0] == "run by":
            assert (ROOT / block.mark[1]).exists(), block


def test_every_page_is_in_the_navigation():
    navigation = set(re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text("utf-8")))
    assert navigation == {str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)}


def test_the_reference_has_every_public_name():
    shown = re.findall(
        r"^::: safelora_fast\.(.+)$", "\n".join(p.read_text("utf-8") for p in (DOCS / "api").glob("*.md")), re.M
    )
    assert sorted(name.rpartition(".")[2] for name in shown) == sorted(
        {*safelora_fast.__all__, *ops.__all__, "Defended"} - {"__version__"}
    )
    assert len(shown) == len(set(shown))


def test_the_errors_of_the_table_are_those_of_the_code():
    code = "\n".join(file.read_text("utf-8") for file in (ROOT / "python" / "safelora_fast").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # strings that continue on the next line
    quoted = re.findall(r"^\| `([^`]+)` \|", (DOCS / "project-errors.md").read_text("utf-8"), re.MULTILINE)
    assert len(quoted) > 10
    assert [line for line in quoted if not all(part in code for part in line.split("…"))] == []


def test_pages_that_the_code_names_exist():
    folders = {"python": "*.py*", "rust": "*.rs", "benches": "*.py", "tests": "*.py"}
    texts = [
        file.read_text("utf-8")
        for folder, ending in folders.items()
        for file in (ROOT / folder).rglob(ending)
        if file.suffix in {".py", ".pyi", ".rs"}
    ]
    named = {name for text in texts for name in re.findall(r"\bdocs/[\w/-]+\.md\b", text)}
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
