"""Tests of the report as Markdown, read back by a parser of GitHub's tables."""

from __future__ import annotations

from itertools import pairwise

import pytest
from made_comparisons import EVERY, HEBREW, HOSTILE, LONG, OUT_OF_MEMORY, begun, hostile, nothing, usual
from markdown_it import MarkdownIt

from safelora_fast.compare.cell_sources import files, link
from safelora_fast.compare.page import escaped, render_markdown

INCOMPLETE = "This comparison is not complete: runs or measures that were asked for are missing."


def parsed(text):
    return MarkdownIt("commonmark").enable("table").parse(text)


def tables(text):
    """Return the rows of cells of each table, as a reader sees them."""
    found = []
    for token, following in pairwise(parsed(text)):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in {"th_open", "td_open"}:
            found[-1][-1].append(words(following))
    return found


def words(inline):
    return "".join(
        "\n" if child.content == "<br>" else child.content
        for child in inline.children
        if child.type in {"text", "text_special", "html_inline"}
    )


def test_the_four_criteria():
    facts, outcomes, sweep, cost, runs = tables(render_markdown(usual()))
    assert facts[1] == ["model", "SmolLM2-135M-Instruct, LoRA r 32, α 64"]
    assert outcomes[0][1] == "no emergent misalignment\nmargin rise (nats) ↓"
    assert outcomes[0][2] == "misaligned answers (%) ↓"
    assert outcomes[0][4] == "benign tasks still learned\noperator-swap exact (%) ↑"
    assert [row[0].partition("\n")[0] for row in outcomes[1:]] == [row.name for row in usual().rows]
    figure, interval, count = outcomes[2][2].split("\n")
    cell = usual().rows[1].cells["misaligned"]
    assert (figure, count) == (f"{100 * cell.value:.1f}", cell.count)
    assert interval == f"[{100 * cell.low:.1f}, {100 * cell.high:.1f}]"
    assert "2 of 3 runs" in outcomes[9][1]
    assert [len(sweep), sweep[1][:2], sweep[-1][:2]] == [8, ["0", "0 of 210"], ["0.6", "210 of 210"]]
    assert cost[0] == ["", "step time (×) ↓", "peak memory (GB) ↓"]
    assert [row[0].partition("\n")[0] for row in cost[1:]] == [row.name for row in usual().rows[1:]]
    assert len(runs) == 1 + 1 + 9 * 3
    assert runs[24][:3] == ["interleaving+", "2", "failed"]


def test_failures_have_their_reason():
    text = render_markdown(usual())
    assert text.count(escaped(OUT_OF_MEMORY)) == 1
    assert f"- interleaving+, seed 2: {OUT_OF_MEMORY} (all measures)\n" in text
    assert INCOMPLETE not in text
    assert INCOMPLETE in render_markdown(nothing())


def test_what_is_not_done_yet_is_told_apart():
    text = render_markdown(begun())
    assert f"**{INCOMPLETE} By run and reason: 1 failed, 5 not done yet.**" in text
    failed, pending = text.index("## Failed runs"), text.index("## Not done yet")
    assert failed < text.index(f"- KL, seed 2: {OUT_OF_MEMORY} (all measures)\n") < pending
    assert pending < text.index("- KL, safe tokens, seed 1: not trained yet (all measures)\n")
    _, outcomes, *_ = tables(text)
    assert outcomes[4][1] == "not trained yet"
    assert "2 of 3 runs so far" in outcomes[2][1]
    assert "1 of 3 runs" in outcomes[3][1]
    assert "so far" not in outcomes[3][1]


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_every_file_is_linked(make):
    addresses = {
        child.attrs["href"]
        for token in parsed(render_markdown(make()))
        for child in token.children or ()
        if child.type == "link_open"
    }
    assert addresses == {link(one.what) for one in files(make())}


def test_hostile_text_stays_text():
    text = render_markdown(hostile())
    tokens = parsed(text)
    raw = [child.content for token in tokens for child in token.children or () if child.type == "html_inline"]
    assert set(raw) == {"<br>"}
    assert not [token for token in tokens if token.type in {"html_block", "ordered_list_open", "code_block"}]
    inline = [token for token in tokens if token.type == "inline"]
    assert words(inline[0]) == HOSTILE
    facts, outcomes, *_ = tables(text)
    assert facts[1:] == [[HOSTILE, HOSTILE], ["right to left", HEBREW], ["long", LONG * 3]]
    assert {len(row) for row in outcomes} == {9}
    assert outcomes[3][0] == f"{HOSTILE}\n</td><img src=x onerror=alert(1)>"
    assert outcomes[4][1] == "failed"
    assert outcomes[5][0] == f"{HEBREW}\n{HEBREW}", "marks that turn the direction of the text around it are left out"
    assert {"1. no list", "- nor this"} <= {words(token) for token in inline}
    assert "\u202e" not in text


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_the_same_report_gives_the_same_text(make):
    assert render_markdown(make()) == render_markdown(make())
