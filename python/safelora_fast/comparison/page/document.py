"""The page as a whole."""

from __future__ import annotations

import base64
import hashlib
import itertools
from importlib.resources import files as package_files
from typing import TYPE_CHECKING

from safelora_fast.comparison.figures_text import format_incomplete
from safelora_fast.comparison.origins import failures, files, link
from safelora_fast.comparison.page.learning_plot import learning_plot
from safelora_fast.comparison.page.markup import Markup, element, foreign, join
from safelora_fast.comparison.page.sweep_plot import sweep_plot
from safelora_fast.comparison.page.tables import outcome_table, runs_table, sweep_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from safelora_fast.comparison.origins import Origin
    from safelora_fast.comparison.report import Column, ComparisonReport

ARROWS = "In brackets 95 % intervals; ↓ lower is better, ↑ higher is better."
OPENS = " A figure opens its runs and their files."


def render_page(report: ComparisonReport) -> str:
    """The report as one HTML page: styles, script and pictures are in it, and its policy lets it load nothing.

    The same report gives the same bytes. Every text of the report is escaped. Links lead to the source files, relative to
    where the page is. Without its script, which sorts tables, the page is whole.
    """
    style, script = (
        Markup(package_files(__package__).joinpath(name).read_text("utf-8")) for name in ("page.css", "page.js")
    )
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", report.title),
        element("style", style),
    )
    body = element("body", element("main", join(_sections(report), "\n")), element("script", script))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _sections(report: ComparisonReport) -> Iterator[Markup]:
    judged = [column for column in report.columns if column.criterion != "cost"]
    cost = [column for column in report.columns if column.criterion == "cost"]
    yield _opening(report)
    outcomes = outcome_table(report, judged, "outcomes", "What each defence prevents, and what it leaves.")
    if outcomes is not None:
        words = element("p", ARROWS, element("span", OPENS, class_="on-screen"), class_="key-line")
        yield _section("Four criteria", outcomes, words, _notes(judged))
    missing = failures(report)
    for title, class_, origins in (
        ("Failed runs", "failures", [one for one in missing if not one.pending]),
        ("Not done yet", "waiting", [one for one in missing if one.pending]),
    ):
        if origins:
            yield _section(title, _missing(origins, class_))
    plot = learning_plot(report, "What each defence lets the model learn, and how far the model drifts.")
    if plot is not None:
        yield _section("Learning against drift", plot)
    if report.sweep:
        chart = sweep_plot(
            report, "The undefended adapter after projection, by the threshold τ; in bands 95 % intervals."
        )
        yield _section("SafeLoRA by threshold", chart, sweep_table(report, "sweep", "The sweep in figures."))
    costs = outcome_table(report, cost, "cost", "What each defence costs.")
    if costs is not None:
        yield _section("Cost", costs, _notes(cost))
    every = runs_table(report, "runs", "Every run; each figure leads to its file.")
    if every is not None:
        yield _section("Every run", every)
    if files(report):
        yield _section("Files", _files(report))  # closed on a screen, open in print


def _opening(report: ComparisonReport) -> Markup:
    banner = None
    if not report.complete:
        banner = element("p", format_incomplete(failures(report)), class_="banner", role="note")
    reading = (
        element("ul", *(element("li", foreign(sentence)) for sentence in report.reading)) if report.reading else None
    )
    facts = [
        element("div", element("dt", foreign(label)), element("dd", foreign(fact)))
        for label, fact in report.facts.items()
    ]
    parts = element(
        "div",
        element("section", element("h2", "Reading"), reading, class_="reading") if reading else None,
        element("section", element("h2", "Set-up"), element("dl", *facts), class_="facts") if facts else None,
        class_="opening",
    )
    return element("header", element("h1", foreign(report.title)), banner, parts)


def _section(title: str, *parts: Markup | None) -> Markup:
    return element("section", element("h2", title), *parts)


def _notes(columns: Sequence[Column]) -> Markup | None:
    notes = [
        element("div", element("dt", foreign(column.title)), element("dd", foreign(column.note)))
        for column in columns
        if column.note
    ]
    return element("dl", *notes, class_="notes") if notes else None


def _missing(origins: Sequence[Origin], class_: str) -> Markup:
    return element("ul", *(
        element("li", foreign(one.place), f", seed {one.seed} (", foreign(one.scope), "): ", foreign(one.what))
        for one in origins
    ), class_=class_)  # fmt: skip


def _files(report: ComparisonReport) -> Markup:
    found, places = files(report), []
    for place, group in itertools.groupby(found, key=lambda one: one.place):
        lines = (
            element(
                "dd",
                element("a", foreign(one.what), href=link(one.what)),
                element("span", f" seed {one.seed}: ", foreign(one.scope)),
            )
            for one in group
        )
        places.append(element("div", element("dt", foreign(place)), *lines))
    count = len({one.what for one in found})
    summary = element("summary", f"{count} {'file' if count == 1 else 'files'} that the figures came from")
    return element("details", summary, element("dl", *places, class_="files"))
