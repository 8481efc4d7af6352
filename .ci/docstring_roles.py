"""Extension of griffe: cross-references of docstrings, such as :class:`~package.module.Name`, become code, `Name`."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")


class DocstringRoles(griffe.Extension):
    """Replaces the roles of Sphinx in docstrings, which Markdown does not know."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object as soon as it is loaded."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(lambda role: f"`{role[1].rpartition('.')[2]}`", obj.docstring.value)
