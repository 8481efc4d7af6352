"""Axes and labels of the page's drawings."""

from __future__ import annotations

import itertools
import math

import pytest
from html_pages import read_page
from hypothesis import given
from hypothesis import strategies as some
from made_comparisons import usual

from safelora_fast.comparison.page import render_page
from safelora_fast.comparison.page.labels import Box, Labels, shortened, text_width, wrapped
from safelora_fast.comparison.page.marks import SHAPES, styles
from safelora_fast.comparison.page.scale import Scale, round_step

FIGURES = some.lists(some.floats(-1e6, 1e6).map(lambda value: round(value, 6)), min_size=1, max_size=8)
PLACES = some.lists(some.tuples(some.floats(60, 740), some.floats(20, 380)), min_size=1, max_size=30)


@given(FIGURES, some.integers(2, 9))
def test_ticks_are_round_and_few(values, count):
    scale = Scale.over(values, 50, 750, ticks=count)
    assert scale.low < min(values) <= max(values) < scale.high
    assert 2 <= len(scale.ticks) <= max(count, 4) + 1
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks)
    assert len({scale.text(tick) for tick in scale.ticks}) == len(scale.ticks)
    for tick in scale.ticks:
        written = float(scale.text(tick).replace("−", "-"))
        assert written == pytest.approx(tick, rel=1e-9, abs=1e-9 * (scale.high - scale.low))
    assert min(values) < 0 or min(scale.ticks) >= 0


@given(FIGURES, some.booleans())
def test_places_are_linear(values, inverted):
    ends = (750, 50) if inverted else (50, 750)
    scale = Scale.over(values, *ends, ticks=5)
    assert scale.place(scale.low) == pytest.approx(ends[0])
    assert scale.place(scale.high) == pytest.approx(ends[1])
    middle = scale.low + 0.5 * (scale.high - scale.low)
    assert scale.place(middle) == pytest.approx(400)


@pytest.mark.parametrize(
    ("least", "step"), [(0.11, 0.2), (0.2, 0.2), (0.3, 0.5), (0.7, 1.0), (1.0, 1.0), (31, 50), (6e-5, 1e-4)]
)
def test_steps(least, step):
    assert round_step(least) == pytest.approx(step)


def test_one_tick_would_tell_no_distance():
    thresholds = [number / 10 for number in range(1, 10)]
    assert Scale.over(thresholds, 0, 200, ticks=4).ticks == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_without_values():
    assert Scale.over([math.nan], 0, 1, ticks=4).ticks


@given(PLACES, some.integers(3, 24))
def test_no_label_on_another_or_on_a_mark(places, length):
    area = Box(50, 10, 750, 390)
    marks = [Box.around(x, y, 6) for x, y in places]
    labels = Labels(area, marks, [], 12)
    found = [labels.put("x" * length, x, y) for x, y in places]
    boxes = [label.box for label in found if label is not None]
    assert all(box.within(area) for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert not any(box.overlaps(mark) for box in boxes for mark in marks)
    assert found[0] is not None or len(places) > 1


def test_a_label_keeps_off_lines_where_it_can():
    area, line = Box(0, 0, 400, 400), Box(200, 195, 400, 205)
    label = Labels(area, [Box.around(200, 200, 6)], [line] * 4, 12).put("name", 200, 200)
    assert label is not None
    assert not label.box.overlaps(line)


@given(some.text(min_size=1, max_size=60), some.floats(30, 200))
def test_long_names_are_cut_to_their_width(text, width):
    short = shortened(text, width, 12)
    assert text_width(short, 12) <= width or len(short) <= 2
    assert short == text or (short.endswith("…") and text.startswith(short[:-1].rstrip()))


@given(some.lists(some.text("abc", min_size=1, max_size=12), max_size=20), some.integers(1, 3))
def test_titles_are_broken_between_words(words, lines):
    found = wrapped(" ".join(words), 100, 12, lines)
    assert len(found) <= lines
    cut = any(line.endswith("…") for line in found)
    assert cut or " ".join(found).split() == words


def test_forty_nine_rows_look_different():
    """Then all colours have come with all shapes."""
    found = styles([usual().rows[2]] * 49)
    assert len({(style.colour, style.shape) for style in found}) == 49
    assert len({style.colour for style in found[:7]}) == len({style.shape for style in found[:7]}) == 7 == len(SHAPES)
    assert styles(usual().rows)[0].colour == "reference"


def test_marks_stand_where_the_axes_say():
    """The place of every mean, read back from the ticks of the drawing."""
    drawing = next(read_page(render_page(usual())).one("figure", class_="learning").all("svg", role="img"))
    ticks = [(tick.attributes, float(tick.text)) for tick in drawing.all("text", class_="tick")]
    across = [(float(where["x"]), value) for where, value in ticks if where["text-anchor"] == "middle"]
    up = [(float(where["y"]), value) for where, value in ticks if where["text-anchor"] == "end"]
    rows = usual().rows
    circles = [mark for mark in drawing.all("circle", class_="mark") if not mark.has("class_", "run")]
    for mark in circles:
        [row] = [row for row in rows if mark.one("title").text.startswith(f"{row.name}:")]
        learned, drift = 100 * row.cells["learned"].value, row.cells["kl"].value
        assert float(mark.attributes["cx"]) == pytest.approx(_along(across, learned), abs=0.2)
        assert float(mark.attributes["cy"]) == pytest.approx(_along(up, drift) - 0.35 * 13, abs=0.2)
    assert len(circles) == 2


def _along(ticks, value):
    (first, low), (last, high) = ticks[0], ticks[-1]
    return first + (value - low) / (high - low) * (last - first)
