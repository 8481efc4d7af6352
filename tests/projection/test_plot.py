"""The plot of a report: positions of modules, and one line per kind of module."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from safelora_fast.projection.plot import plot_report
from safelora_fast.projection.report import AdapterReport, ModuleReport, ProjectionReport
from safelora_fast.projection.settings import Settings

figure = pytest.importorskip("matplotlib.figure")


def module(name, cosine=0.4, **fields):
    plain = ModuleReport(name, cosine, cosine <= 0.5, "", cosine / 2, 4, 1.0, 1.0, 1.0, 1.0, 1.0, None, None, [])
    return replace(plain, **fields)


def draw(modules, monkeypatch, tmp_path, **settings):
    """Return the two panels as saved to the file."""
    kept = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *words, **more: (kept.append(self), save(self, *words, **more))
    )
    asked = Settings(**settings)
    plain = {**vars(asked), **asked.effective()}
    adapter = AdapterReport("adapter", None, modules, [])
    report = ProjectionReport(plain, {"source": "a"}, {"source": "b"}, [adapter], 0, 1.0, {})
    plot_report(report, tmp_path / "picture.svg")
    return kept[0].axes


def lines(axis):
    return [list(zip(*line.get_data(), strict=True)) for line in axis.get_lines() if line.get_linestyle() == "-"]


def points(axis):
    marked = [line for line in axis.get_lines() if line.get_linestyle() == "None"]
    return sorted(point for line in marked for point in zip(*line.get_data(), strict=True))


def kinds_of(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_kinds_of_one_last_name_have_lines_of_their_own(monkeypatch, tmp_path):
    cosines = {"attn.c_proj": (0.1, 0.2), "mlp.c_proj": (0.8, 0.9)}
    modules = [module(f"transformer.h.{block}.{end}", cosines[end][block]) for block in (0, 1) for end in cosines]
    left, right = draw(modules, monkeypatch, tmp_path)
    assert lines(left) == [[(0, 0.1), (1, 0.2)], [(0, 0.8), (1, 0.9)]]
    assert kinds_of(right) == ["attn.c_proj", "mlp.c_proj"]


def test_the_line_of_experts_goes_through_their_median(monkeypatch, tmp_path):
    cosines = [(0.1, 0.7, 0.2), (0.3, 0.4, 0.9)]
    modules = [
        module(f"model.layers.{block}.mlp.experts.{expert}.down_proj", cosine)
        for block, of_block in enumerate(cosines)
        for expert, cosine in enumerate(of_block)
    ]
    left, _ = draw(modules, monkeypatch, tmp_path)
    assert lines(left) == [[(0, 0.2), (1, 0.4)]]
    assert points(left) == sorted((block, cosine) for block, of_block in enumerate(cosines) for cosine in of_block)


def test_modules_outside_the_blocks_stand_beside_them_with_their_names(monkeypatch, tmp_path):
    blocks = [module(f"model.layers.{block}.self_attn.q_proj", 0.3) for block in range(4)]
    modules = [module("lm_head", 0.9), module("model.embed_tokens", 0.7), *blocks]
    left, right = draw(modules, monkeypatch, tmp_path)
    ticks = {label.get_text(): place for place, label in zip(left.get_xticks(), left.get_xticklabels(), strict=True)}
    assert ticks["embed_tokens"] < 0
    assert ticks["lm_head"] > 3
    assert {(ticks["embed_tokens"], 0.7), (ticks["lm_head"], 0.9)} < set(points(left))
    assert kinds_of(right) == ["q_proj"]


def test_what_has_no_cosine_has_neither_point_nor_name(monkeypatch, tmp_path):
    modules = [module("model.layers.0.self_attn.q_proj"), module("model.embed_tokens", math.nan, gain=math.nan)]
    left, _ = draw(modules, monkeypatch, tmp_path)
    assert points(left) == [(0, 0.4)]
    assert [label.get_text() for label in left.get_xticklabels()] == ["0"]
    assert "1 without a cosine" in left.get_title("left")


def test_more_kinds_than_colors_are_told_apart(monkeypatch, tmp_path):
    modules = [module(f"model.layers.0.kind_{number:02d}") for number in range(20)]
    _, right = draw(modules, monkeypatch, tmp_path)
    styles = {(line.get_color(), line.get_marker()) for line in right.get_legend().get_lines()}
    assert len(styles) == 20


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "Gain of SafeLoRA"),
        ({"normalize": "spectral"}, "spectral"),
        ({"operator": "orthogonal", "rank": 8}, "the orthogonal projection (rank 8)"),
        ({"operator": "orthogonal", "energy": 0.9}, "orthogonal projection (energy 0.9)"),
        ({"operator": "zero"}, "zero control"),
    ],
)
def test_the_operator_is_named_in_words(monkeypatch, tmp_path, settings, words):
    _, right = draw([module("model.layers.0.q_proj")], monkeypatch, tmp_path, **settings)
    assert words in right.get_title()


def test_the_threshold_is_named_beside_the_panel(monkeypatch, tmp_path):
    left, _ = draw([module("model.layers.0.q_proj")], monkeypatch, tmp_path, threshold=0.25)
    (label,) = (text for text in left.texts if "threshold" in text.get_text())
    assert "0.25" in label.get_text()
    assert label.get_window_extent().x0 > left.get_window_extent().x1


def test_a_report_without_a_single_cosine(monkeypatch, tmp_path):
    left, right = draw([module("model.layers.0.q_proj", math.nan, gain=math.nan)], monkeypatch, tmp_path)
    assert points(left) == points(right) == []
