"""Tests of the page in headless Chromium: on a desktop, on a phone, in dark mode, printed, and by keyboard."""

from __future__ import annotations

import functools
import io
import itertools
import re
import shutil

import numpy as np
import pytest
from made_comparisons import EVERY, HOSTILE, OUT_OF_MEMORY, hostile, usual

from safelora_fast.compare.page import render_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is installed")

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 780}
PAPER = {"width": 703, "height": 1017}  # A4 without its margins
BLUE = (0x00, 0x72, 0xB2)


@functools.cache
def text_of(make):
    return render_page(make())


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens a report; any message, error or further request of the browser fails the test."""
    contexts, complaints, asked, files = [], [], [], set()

    def open_report(make, viewport=DESK, **options):
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        file = tmp_path / f"page-{len(contexts)}.html"
        file.write_text(text_of(make), encoding="utf-8")
        files.add(file.as_uri())
        page.goto(file.as_uri())
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert complaints == []
    assert set(asked) == files, "the page asks for nothing but itself"


def picture(page, **options):
    """Return the whole page in RGB, [height, width, 3]."""
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(io.BytesIO(page.screenshot(full_page=True, **options))).convert("RGB")).astype(int)


def near(pixels, color, distance=12):
    return np.abs(pixels - np.array(color)).max(axis=-1) <= distance


def names(page, table="outcomes"):
    """Return the names of a table's rows, from top to bottom."""
    return page.locator(f"#{table}-caption ~ tbody > tr .name").all_inner_texts()


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_nothing_is_cut_off(opened, make, viewport):
    """No element is wider than the screen; tables scroll to their last column, and keep the first one visible."""
    page = opened(make, viewport)
    width = viewport["width"]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = page.evaluate(
        """width => [...document.querySelectorAll("main *")].filter(each => !each.closest("table") && !each.closest("svg"))
        .filter(each => each.getBoundingClientRect().right > width + 0.5).map(each => each.outerHTML.slice(0, 80))""",
        width,
    )
    assert outside == []
    for scroll in page.locator(".scroll").all():
        first, last = scroll.evaluate(
            """each => {
              each.scrollLeft = each.scrollWidth;
              const row = each.querySelector("tbody tr");
              return [row.cells[0].getBoundingClientRect().left, row.lastElementChild.getBoundingClientRect().right];
            }"""
        )
        assert first >= 0
        assert last <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_the_picture(opened, viewport, scheme):
    """Checks background, amount of text and gaps; the first color appears in the plot and beside the names."""
    page = opened(usual, viewport, color_scheme=scheme)
    pixels = picture(page)
    board = pixels[0, 0]
    assert board.min() > 250 if scheme == "light" else board.max() < 40
    written = 1 - near(pixels, board).mean()
    assert 0.02 < written < 0.3
    filled = near(pixels, board).mean(axis=1) < 1
    blank = max((len(list(run)) for value, run in itertools.groupby(filled) if not value), default=0)
    assert blank < 200, "no large hole in the page"
    if scheme == "light":
        figure = page.locator("figure.learning").bounding_box()
        plot = pixels[int(figure["y"]) : int(figure["y"] + figure["height"])]
        assert near(plot, BLUE).sum() > 100
        assert near(pixels[: int(figure["y"])], BLUE).sum() > 50


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened, scheme):
    """WCAG 2.2 AA: contrast with the page of 4.5 for text and 3 for marks."""
    page = opened(usual, color_scheme=scheme)
    colors = dict(
        page.evaluate(
            """names => names.map(name => [name, getComputedStyle(document.documentElement).getPropertyValue(name)])""",
            [
                "--page",
                "--ink",
                "--muted",
                "--link",
                "--fail",
                *(f"--c{number}-edge" for number in range(7)),
                "--reference-edge",
            ],
        )
    )
    board = luminance(colors.pop("--page"))
    for name, color in colors.items():
        light, dark = max(board, luminance(color)), min(board, luminance(color))
        assert (light + 0.05) / (dark + 0.05) >= (3.0 if name.endswith("-edge") else 4.5), name


def luminance(color):
    """Return the relative luminance of #rrggbb (WCAG 2.2)."""
    parts = (int(color.strip()[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_headings_sort(opened):
    """Best first, then worst first, then report order; the reference stays on top, failures at the end."""
    page, report = opened(hostile), hostile()
    usual_order = names(page)
    heading = page.locator("#outcomes-caption ~ thead th[aria-sort]", has_text="learned")
    values = {row.name: row.cells["learned"].value for row in report.rows if "learned" in row.cells}
    known = [name for name in usual_order[1:] if values.get(name) is not None]
    unknown = [name for name in usual_order[1:] if values.get(name) is None]
    assert (len(known), len(unknown)) == (3, 2)
    for state, rising in (("descending", False), ("ascending", True)):
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == state
        ordered = sorted(known, key=values.__getitem__, reverse=not rising)
        assert names(page) == [usual_order[0], *ordered, *unknown]
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "none"
    assert names(page) == usual_order


def test_headings_sort_by_keyboard_and_by_name(opened):
    page = opened(usual)
    heading = page.locator("#outcomes-caption ~ thead th[aria-sort]", has_text="defense")
    heading.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert names(page) == ["reference", *sorted((row.name for row in usual().rows[1:]), key=str.lower)]
    other = page.locator("#outcomes-caption ~ thead th[aria-sort]", has_text="margin rise")
    other.get_by_role("button").focus()
    page.keyboard.press("Space")
    assert [each.get_attribute("aria-sort") for each in (heading, other)] == ["none", "ascending"]
    rows = usual().rows
    assert names(page)[1:] == [row.name for row in sorted(rows[1:], key=lambda row: row.cells["rise"].value)]


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_a_figure_opens_its_runs_by_keyboard(opened, viewport):
    page = opened(usual, viewport)
    button = page.locator("[popovertarget=outcomes-8-0]")
    card = page.locator("#outcomes-8-0")
    button.focus()
    assert not card.is_visible()
    page.keyboard.press("Enter")
    box = card.bounding_box()
    assert 0 <= box["x"] <= box["x"] + box["width"] <= viewport["width"]
    assert 0 <= box["y"] <= box["y"] + box["height"] <= viewport["height"]
    lines = card.locator("li").all_inner_texts()
    assert [line.split("\n")[0] for line in lines] == ["seed 1", "seed 2", "seed 3"]
    assert OUT_OF_MEMORY in lines[1]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "./interleaving%2B/seed-1/margin.json"
    page.keyboard.press("Escape")
    assert not card.is_visible()


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_names_in_the_plot_stand_apart(opened, make):
    """Measured by the browser with its own fonts."""
    page = opened(make)
    for drawing in page.locator("figure.learning .for-wide svg").all():
        boxes = drawing.evaluate(
            """each => [...each.querySelectorAll(".name text, .step-name text, .mark use")].map(part => {
              const box = part.getBBox();
              return [part.tagName === "text", box.x, box.y, box.x + box.width, box.y + box.height];
            })"""
        )
        texts = [box[1:] for box in boxes if box[0]]
        marks = [box[1:] for box in boxes if not box[0]]
        width, height = map(float, drawing.get_attribute("viewBox").split()[2:])
        assert all(left >= 0 and top >= 0 and right <= width and bottom <= height for left, top, right, bottom in texts)
        pairs = itertools.chain(itertools.combinations(texts, 2), itertools.product(texts, marks))
        assert not [(one, other) for one, other in pairs if overlap(one, other)]


def overlap(one, other, slack=1.5):
    """Return whether two boxes overlap by more than `slack`; boxes of glyphs are larger than the glyphs."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return across > slack and down > slack


def test_printed(opened):
    """A4, black on white in any color scheme, with nothing hidden or cut off."""
    page = opened(usual, PAPER, color_scheme="dark")
    printed = page.pdf(prefer_css_page_size=True)
    boxes = {tuple(float(side) for side in box.split()) for box in re.findall(rb"/MediaBox \[([^\]]+)\]", printed)}
    assert {(round(right), round(top)) for _, _, right, top in boxes} == {(595, 842)}
    page.emulate_media(media="print")
    pixels = picture(page)
    assert (pixels[0, 0] == 255).all()
    assert 0.02 < 1 - near(pixels, (255, 255, 255)).mean() < 0.3
    assert all(
        page.evaluate("[...document.querySelectorAll('.scroll')].map(each => each.scrollWidth <= each.clientWidth)")
    )
    assert page.get_by_text("persona-steering/seed-3/run.json", exact=True).last.bounding_box()["height"] > 0
    assert OUT_OF_MEMORY in page.locator(".failures").inner_text()
    assert not page.locator(".card:visible").all()


def test_without_its_script_the_page_is_whole(opened):
    page = opened(usual, java_script_enabled=False)
    assert page.locator("thead button").count() == 0
    assert names(page) == [row.name for row in usual().rows]
    page.locator("[popovertarget=outcomes-8-0]").click()
    assert page.locator("#outcomes-8-0").is_visible()
    page.locator("summary").click()
    assert page.get_by_role("link", name="persona-steering/seed-3/run.json").last.is_visible()


def test_hostile_text_is_shown_and_does_nothing(opened):
    page = opened(hostile)
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("img, main script, iframe").count() == 0
    assert page.evaluate("document.title") == HOSTILE
