"""Renders a comparison report as a self-contained HTML page and as Markdown, from templates with one context."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files as package_files
from itertools import groupby
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from safelora_fast.compare.cell_sources import failures, files, link, runs, sweep_columns, sweep_place
from safelora_fast.compare.plots import learning_plot, styles, sweep_plots
from safelora_fast.compare.report import CRITERIA
from safelora_fast.compare.words import environment
from safelora_fast.printable import without_controls

if TYPE_CHECKING:
    from safelora_fast.compare.report import ComparisonReport


def render_page(report: ComparisonReport) -> str:
    """Return the report as one HTML page with inline styles, script and pictures; its policy blocks all loading.

    The same report gives the same bytes. All text of the report is escaped. Links to source files are relative to the
    page. The script only sorts tables; without it, the page still shows everything.
    """
    style, script = (_template_file(name) for name in ("page.css", "page.js"))
    return environment("html", _for_html).get_template("page.html.j2").render(
        **_context(report),
        style=style,
        script=script,
        style_hash=_sha256(style),
        script_hash=_sha256(script),
        learning=learning_plot(report, report.plot),
        margins=learning_plot(report, report.margin_plot, "margin-"),
        panels=list(sweep_plots(report)) if report.sweep else [],
        styles=styles(report.rows),
    )  # fmt: skip


def render_markdown(report: ComparisonReport) -> str:
    """Return the report as Markdown with GitHub tables, without pictures; the same report gives the same text.

    All text of the report is escaped, so it stays text and inside its cell.
    """
    return (
        environment("markdown", _for_markdown).get_template("report.md.j2").render(_context(report)).strip("\n") + "\n"
    )


def escaped(text: str) -> str:
    """Escape text for Markdown, and put it on one line."""
    line = " ".join(without_controls(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]#|~$!@])", r"\\\1", line)
    return re.sub(r"^(\d+)([.)])(?=\s|$)|^([-+=])", lambda found: f"{found[1] or ''}\\{found[2] or found[3]}", line)


def _context(report: ComparisonReport) -> dict[str, Any]:
    """Return the context that both templates share."""
    return {
        "report": report,
        "judged": [column for column in report.columns if column.criterion != "cost"],
        "cost": [column for column in report.columns if column.criterion == "cost"],
        "criteria": CRITERIA,
        "missing": failures(report),
        "files": files(report),
        "sweep_columns": sweep_columns(report),
        "runs": [(row, seed, values) for row in report.rows for seed, values in runs(row).items()],
        "rows_with": lambda columns: [row for row in report.rows if any(one.key in row.cells for one in columns)],
        "link": link,
        "sweep_place": sweep_place,
        "groups": lambda items, attribute: [
            (name, list(group)) for name, group in groupby(items, key=lambda item: getattr(item, attribute))
        ],
        "clauses": lambda text: re.split(r"(?<=[,;]) ", text),
    }


def _for_html(value: Any) -> Any:
    return without_controls(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _for_markdown(value: Any) -> Any:
    return escaped(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _template_file(name: str) -> str:
    return package_files("safelora_fast.compare").joinpath(f"templates/{name}").read_text("utf-8")


def _sha256(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
