"""Command classes whose help shows no type next to --help."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class Command(TyperCommand):
    """A command whose help shows no type next to --help."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the help option, without its type."""
        return _without_type(super().get_help_option(ctx))


class Group(TyperGroup):
    """A group of commands whose help shows no type next to --help."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the help option, without its type."""
        return _without_type(super().get_help_option(ctx))


def _without_type(option: Any) -> Any:
    if option is not None:
        option.metavar = ""
    return option
