"""A comparison report as one HTML page that needs nothing beside it."""

from __future__ import annotations

from safelora_fast.comparison.page.document import render_page

__all__ = ["render_page"]
