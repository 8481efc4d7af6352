"""A comparison report as one HTML page that needs nothing beside it, and as Markdown; both are templates over the same context."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files as package_files
from itertools import groupby
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from safelora_fast.compare import number_text
from safelora_fast.compare.cell_sources import failures, files, has_any, link, runs, sweep_columns, sweep_place
from safelora_fast.compare.number_text import is_figure, one_line, printable
from safelora_fast.compare.plots import learning_plot, styles, sweep_plots
from safelora_fast.compare.report import CRITERIA

if TYPE_CHECKING:
    from collections.abc import Callable

    from jinja2 import Template

    from safelora_fast.compare.report import ComparisonReport


def render_page(report: ComparisonReport) -> str:
    """The report as one HTML page: styles, script and pictures are in it, and its policy lets it load nothing.

    The same report gives the same bytes. Every text of the report is escaped. Links lead to the source files, relative to
    where the page is. Without its script, which sorts tables, the page is whole.
    """
    style, script = (_template_file(name) for name in ("page.css", "page.js"))
    return _template("page.html.j2", _for_html).render(
        _context(report),
        style=style,
        script=script,
        style_hash=_sha256(style),
        script_hash=_sha256(script),
        learning=learning_plot(report),
        panels=list(sweep_plots(report)) if report.sweep else [],
        styles=styles(report.rows),
    )


def render_markdown(report: ComparisonReport) -> str:
    """All of the page but its pictures as Markdown, with the tables of GitHub; the same report gives the same text.

    Every text of the report is escaped, whatever it holds, so that it stays text and in its cell.
    """
    return _template("report.md.j2", _for_markdown).render(_context(report)).strip("\n") + "\n"


def escaped(text: str) -> str:
    """A text that Markdown shows as it is, in one line."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]#|~$!@])", r"\\\1", line)
    return re.sub(r"^(\d+)([.)])(?=\s|$)|^([-+=])", lambda found: f"{found[1] or ''}\\{found[2] or found[3]}", line)


def _context(report: ComparisonReport) -> dict[str, Any]:
    """What both templates are made from."""
    missing = failures(report)
    return {
        "report": report,
        "judged": [column for column in report.columns if column.criterion != "cost"],
        "cost": [column for column in report.columns if column.criterion == "cost"],
        "criteria": CRITERIA,
        "missing": missing,
        "failed": [one for one in missing if not one.pending],
        "waiting": [one for one in missing if one.pending],
        "files": files(report),
        "sweep_columns": sweep_columns(report),
        "runs": [(row, seed, values) for row in report.rows for seed, values in runs(row).items()],
        "has_any": has_any,
        "is_figure": is_figure,
        "link": link,
        "sweep_place": sweep_place,
        "groupby_criterion": lambda columns: [
            (criterion, len(list(group))) for criterion, group in groupby(columns, key=lambda column: column.criterion)
        ],
        "clauses": lambda text: re.split(r"(?<=[,;]) ", text),
        "text": number_text,
    }


def _for_html(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _for_markdown(value: Any) -> Any:
    return escaped(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _template(name: str, finalize: Callable[[Any], Any]) -> Template:
    """A template in which every text is made harmless where it is put in, unless it is marked safe."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("safelora_fast.compare", "templates"),
        autoescape=name.endswith(".html.j2"),
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["has_any_of"] = has_any
    environment.filters["groupby_place"] = lambda origins: [
        (place, list(group)) for place, group in groupby(origins, key=lambda one: one.place)
    ]
    return environment.get_template(name)


def _template_file(name: str) -> str:
    return package_files("safelora_fast.compare").joinpath(f"templates/{name}").read_text("utf-8")


def _sha256(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
