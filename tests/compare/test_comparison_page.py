"""Tests of the HTML page without a browser: its content, its links, and that it can load nothing."""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from html_pages import read_page
from hypothesis import given, settings
from hypothesis import strategies as some
from made_comparisons import EVERY, HEBREW, HOSTILE, LONG, OUT_OF_MEMORY, begun, hostile, many, nothing, one_row, usual

from safelora_fast.compare.cell_sources import files, link
from safelora_fast.compare.page import render_page
from safelora_fast.compare.plots import styles
from safelora_fast.compare.report import CRITERIA, ComparisonReport
from safelora_fast.printable import without_controls as printable

INCOMPLETE = "This comparison is not complete: runs or measures that were asked for are missing."

EXPECTED = {"Cost", "Every run", "Files", "Four criteria", "Learning against drift", "SafeLoRA by threshold"}
ELEMENTS = """html head meta title style script body main header section h1 h2 p ul li dl div dt dd bdi span b a button table
    caption thead tbody tr th td figure figcaption details summary svg g defs use path rect clippath text"""
ATTRIBUTES = """lang charset http-equiv content name class id role tabindex scope colspan rowspan title href type popover
    popovertarget aria-hidden aria-label aria-labelledby aria-sort data-first data-value data-pinned viewbox style d x y width
    height transform clip-path"""


@functools.cache
def text_of(make):
    return render_page(make())


def page_of(make):
    return read_page(text_of(make))


def lines_of(page, identity):
    """Return the rows of a table's body."""
    [table] = [table for table in page.all("table") if table.one("caption").attributes["id"] == f"{identity}-caption"]
    return list(table.one("tbody").all("tr"))


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_only_harmless_elements(make):
    """An allowlist: no text of a report becomes an element or an attribute."""
    page = page_of(make)
    assert {node.name for node in page.all()} <= set(ELEMENTS.split())
    assert {name for node in page.all() for name in node.attributes} <= set(ATTRIBUTES.split())
    identities = [node.attributes["id"] for node in page.all() if "id" in node.attributes]
    assert len(identities) == len(set(identities))
    opened = {node.attributes["popovertarget"] for node in page.all("button")}
    assert opened == {node.attributes["id"] for node in page.all("div", class_="card")}


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_it_can_load_nothing(make):
    """The policy allows only this style and this script, by hash, and style attributes."""
    page = page_of(make)
    style, script = page.one("style").text, page.one("script").text
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    assert page.one("meta", http_equiv="Content-Security-Policy").attributes["content"].split("; ") == [
        "default-src 'none'",
        f"style-src-elem 'sha256-{next(hashes)}'",
        "style-src-attr 'unsafe-inline'",
        f"script-src 'sha256-{next(hashes)}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert not re.search(r"url\(|@import|https?:|fetch|import\s*\(|innerHTML|</", style + script)
    assert all(
        re.fullmatch(r"url\(#\w+\)", node.attributes["clip-path"])
        for node in page.all()
        if "clip-path" in node.attributes
    )
    assert not [node for node in page.all() if "url" in node.attributes.get("style", "")]
    assert {node.attributes["href"][0] for node in page.all("use")} <= {"#"}
    for anchor in page.all("a"):
        assert re.match(r"(\./|\.\./)[^/\\:]", anchor.attributes["href"]), "no other scheme and no other host"


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_every_file_is_linked_where_its_figure_stands(make):
    report, page = make(), page_of(make)
    assert {anchor.attributes["href"] for anchor in page.all("a")} == {link(one.what) for one in files(report)}
    cards = ["".join(card.text.split()) for card in page.all("div", class_="card")]
    cells = [one for row in (*report.rows, *report.sweep) for one in row.cells.values()]
    assert len(cards) == len(cells)
    for one in cells:
        wanted = ["".join(part.split()) for run in one.seeds for part in (f"seed {run.seed}", printable(run.source))]
        assert any(all(part in card for part in wanted) for card in cards)


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_the_same_report_gives_the_same_bytes(make):
    assert render_page(make()) == text_of(make)


def test_the_same_bytes_in_every_process():
    program = "import hashlib, made_comparisons as made; from safelora_fast.compare.page import render_page as page; " \
        "print(hashlib.sha256(page(made.hostile()).encode()).hexdigest())"  # fmt: skip
    path = os.pathsep.join(sys.path)
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert digests == {hashlib.sha256(text_of(hostile).encode()).hexdigest() + "\n"}


def test_the_four_criteria():
    page = page_of(usual)
    assert {heading.text for heading in page.all("h2")} == EXPECTED | {"Failed runs", "Reading", "Set-up"}
    groups = {group.text: group.attributes["colspan"] for group in page.all("th", class_="criterion")}
    assert groups == dict(zip(list(CRITERIA.values())[:4], "3122", strict=True))
    lines = lines_of(page, "outcomes")
    assert [line.one("span", class_="name").text for line in lines] == [row.name for row in usual().rows]
    assert [line.attributes.get("data-pinned") for line in lines] == ["", *[None] * 9]
    undefended, cells = list(lines[1].all("td")), usual().rows[1].cells
    assert [float(cell.attributes["data-value"]) for cell in undefended] == [
        cells[column.key].value for column in usual().columns[:8]
    ]
    misaligned = undefended[1]
    assert misaligned.one("button").text == f"{100 * cells['misaligned'].value:.1f}"
    assert misaligned.one("span", class_="count").text == cells["misaligned"].count
    assert misaligned.one("span", class_="interval").text.startswith("[")
    assert "misaligned answers % ↓ (lower is better)" in page.text


def test_what_failed_is_marked_in_words_with_its_reason():
    page = page_of(usual)
    lost = lines_of(page, "outcomes")[8]
    assert [part.text for part in lost.all("span", class_="partial")] == ["2 of 3 runs"] * 8
    assert f"seed 2failed: {OUT_OF_MEMORY}" in next(lost.all("div", class_="card")).text
    assert page.one("ul", class_="failures").text == f"interleaving+, seed 2 (all measures): {OUT_OF_MEMORY}"
    gone = lines_of(page_of(hostile), "outcomes")[3]
    assert [cell.one("button").text for cell in gone.all("td")] == ["✕ failed"] * 8
    assert all(cell.has("class_", "failed") and "data-value" not in cell.attributes for cell in gone.all("td"))
    assert gone.text.count(HOSTILE) == 8 * 3 + 1, "the reason of each run, and a column's title"
    assert INCOMPLETE not in page.text
    assert INCOMPLETE in page_of(nothing).text


def test_what_is_not_done_yet_is_not_said_to_have_failed():
    page = page_of(begun)
    assert f"{INCOMPLETE} By run and reason: 1 failed, 5 not done yet." in page.one("p", class_="banner").text
    assert [one.text for one in page.one("ul", class_="failures").all("li")] == [
        f"KL, seed 2 (all measures): {OUT_OF_MEMORY}"
    ]
    assert page.one("ul", class_="waiting").text.count("not trained yet") == 4
    headings = [heading.text for heading in page.all("h2")]
    assert headings.index("Failed runs") + 1 == headings.index("Not done yet")
    none, kl, tokens = lines_of(page, "outcomes")[1:4]
    assert [cell.one("button").text for cell in tokens.all("td")] == ["not trained yet"] * 8
    assert all(cell.has("class_", "waiting") and "data-value" not in cell.attributes for cell in tokens.all("td"))
    assert [part.text for part in none.all("span", class_="waiting")][:1] == ["2 of 3 runs so far"]
    assert not list(none.all("span", class_="partial"))
    assert [part.text for part in kl.all("span", class_="partial")] == ["1 of 3 runs"] * 8
    card = next(none.all("div", class_="card")).text
    assert "seed 3the reference: not measured yet" in card
    runs = lines_of(page, "runs")
    told = {cell.text: cell.attributes.get("class") for line in runs for cell in line.all("td") if " yet" in cell.text}
    assert told == {"not trained yet": "waiting", "not measured yet": "waiting"}
    assert "failed: not" not in page.text


def test_every_run_by_itself():
    lines = lines_of(page_of(usual), "runs")
    assert len(lines) == 1 + 9 * 3
    for line, (row, seed) in zip(
        lines[1:], ((row, seed) for row in usual().rows[1:] for seed in range(3)), strict=True
    ):
        runs = [row.cells[column.key].seeds[seed] for column in usual().columns]
        seeds, *cells = line.all("td")
        assert seeds.text == str(seed + 1)
        assert [cell.one("a").attributes["href"] for cell in cells] == [link(run.source) for run in runs]
        values = [cell.attributes.get("data-value") for cell in cells]
        assert values == [None if run.value is None else repr(run.value) for run in runs]


def test_what_was_not_measured_is_left_out():
    assert [heading.text for heading in page_of(nothing).all("h2")] == []
    headings = [heading.text for heading in page_of(one_row).all("h2")]
    assert headings == ["Four criteria", "Every run", "Files"]
    absent = lines_of(page_of(many), "outcomes")[2]
    assert [cell.text for cell in absent.all("td", class_="absent")] == ["–"] * 5


def test_the_plot_has_every_row_with_both_measures():
    figure = page_of(hostile).one("figure", class_="learning")
    for drawing in figure.all("svg", role="img"):
        marks = list(drawing.all(class_="mark"))
        shown = [row for row in hostile().rows if row.name not in {LONG, "few measures"}]
        assert len(marks) == len(shown) == 4
        assert all(mark.one("title").text.startswith(f"{row.name}:") for mark, row in zip(marks, shown, strict=True))
        assert len({mark.one("path").attributes["d"] + mark.one("use").attributes["style"] for mark in marks}) == 4
        assert len(list(drawing.all(class_="run"))) == 1 + 3 + 3 + 3
        assert len(list(drawing.all(class_="step"))) == 5
    assert f"because a value is missing: {LONG}, few measures." in figure.one("figcaption").text
    assert HEBREW in figure.one("ul", class_="legend").text
    assert not list(page_of(one_row).all("figure"))


def test_a_reference_that_others_are_held_against_is_the_start_of_the_path():
    """This reference has no values; steps without a value are left out, before and after `report.json`."""
    report = usual()
    first = replace(report.rows[0], cells={"swap": report.rows[0].cells["swap"]})
    (zero, *steps), plot = report.plot.path, report.plot
    plot = replace(plot, path=((*zero[:2], ""), (math.nan, 0.1, "lost"), *steps))
    report = replace(report, rows=(first, *report.rows[1:]), plot=plot)
    for each in (report, ComparisonReport.from_dict(report.to_dict())):
        page = render_page(each)
        figure = read_page(page).one("figure", class_="learning")
        drawing = next(figure.all("svg", role="img"))
        assert [step.one("title").text for step in drawing.all(class_="step")] == [
            "reference",
            *(step[2] for step in steps),
        ]
        assert "reference" in [name.text for name in drawing.all(class_="step-name")]
        assert "for want of" not in figure.text
        assert not [value for mark in drawing.all("use") for value in mark.attributes.values() if "nan" in value]


def test_rows_without_a_plot_or_a_sweep():
    report = usual()
    page = read_page(render_page(replace(report, plot=None, sweep=())))
    assert {heading.text for heading in page.all("h2")} & EXPECTED == {"Cost", "Every run", "Files", "Four criteria"}
    assert not list(page.all("figure"))


def test_the_sweep_in_figures_and_pictures():
    page, report = page_of(usual), usual()
    figure = page.one("figure", class_="sweep")
    titles = [title.text for title in figure.all(class_="panel-title")]
    assert titles == ["modules projected, of 210", "margin rise (nats) ↓", "KL to reference (nats) ↓", "learned (%) ↑"]
    for drawing in figure.all("svg"):
        places = [float(mark.one("use").attributes["x"]) for mark in drawing.all(class_="point")]
        assert len(places) == 7
        steps = [right - left for left, right in itertools.pairwise(places)]
        assert max(steps) - min(steps) < 1e-3, "thresholds at equal distances stand at equal distances"
    names = [[name.text for name in drawing.all(class_="level-name")] for drawing in figure.all("svg")]
    assert names == [[], *[["reference", "no defense"]] * 3]
    first = [cell.text for cell in lines_of(page, "sweep")[0].all("td")]
    assert first[0] == f"0 of {report.sweep[0].modules}"


@settings(max_examples=40, deadline=None)
@given(some.text(max_size=40), some.text(max_size=40), some.text(max_size=40))
def test_any_text_stays_text(title, name, reason):
    """Any name, title or error is shown as text, and creates no element."""
    report, plain = one_row(), page_of(one_row)
    row = report.rows[0]
    seed = replace(row.cells["rise"].seeds[0], value=None, failure=reason)
    cell = replace(row.cells["rise"], value=None, low=None, high=None, seeds=(seed,), count=name)
    page = read_page(render_page(replace(report, title=title, rows=(replace(row, name=name, cells={"rise": cell}),))))
    assert page.one("title").text == page.one("h1").text == printable(title)
    assert page.one("span", class_="name").text == printable(name)
    assert printable(reason) in page.one("ul", class_="failures").text
    assert len(list(page.all("tr"))) == len(list(plain.all("tr")))
    assert len(list(page.all("script"))) == len(list(page.all("style"))) == 1


def test_marks_stand_where_the_axes_say():
    """Compares the position of every mean with the ticks of the drawing."""
    drawing = next(page_of(usual).one("figure", class_="learning").all("svg", role="img"))
    across, up = [], []
    for tick in drawing.all("text"):
        if re.fullmatch(r"[\d.]+", tick.text):
            x, y = float(tick.attributes["x"]), float(tick.attributes["y"])
            (across if "text-anchor: middle" in tick.attributes["style"] else up).append((x, y, float(tick.text)))
    assert len(across) >= 2 <= len(up)
    rows = {row.name: row for row in usual().rows}
    marks = {
        mark.one("title").text.partition(":")[0]: mark.one("use").attributes for mark in drawing.all(class_="mark")
    }
    assert marks.keys() == rows.keys()
    for name, mark in marks.items():
        learned, drift = 100 * rows[name].cells["learned"].value, rows[name].cells["kl"].value
        assert float(mark["x"]) == pytest.approx(np.interp(learned, *between(across, 0)), abs=0.6)
        assert float(mark["y"]) == pytest.approx(np.interp(drift, *between(up, 1)), abs=6), (
            "a tick's text stands a little lower"
        )


def between(ticks, axis):
    """Return values and positions on the line through the outermost ticks, extended at both ends."""
    (first, low), (last, high) = (
        (tick[axis], tick[2]) for tick in (min(ticks, key=lambda t: t[2]), max(ticks, key=lambda t: t[2]))
    )
    span, step = high - low, last - first
    return [low - span, high + span], [first - step, last + step]


def test_forty_nine_rows_look_different():
    """With 49 rows, every color has been combined with every shape."""
    found = styles([usual().rows[2]] * 49)
    assert len({(style.color, style.character) for style in found}) == 49
    assert len({style.color for style in found[:7]}) == len({style.character for style in found[:7]}) == 7
    assert styles(usual().rows)[0].color == "reference"
