"""Command classes: help without a type next to --help, and the options that were given by the user."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from typer.core import TyperCommand, TyperGroup

from safelora_fast.errors import SettingsError

_given: ContextVar[dict[str, str]] = ContextVar("given", default={})  # noqa: B039 - never changed; by parameter, its option


class Command(TyperCommand):
    """A command whose help shows no type next to --help. While it runs, it knows which options the user has given."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the help option, without its type."""
        return _without_type(super().get_help_option(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        given = {
            str(one.name): max(one.opts, key=len)
            for one in self.params
            if getattr(ctx.get_parameter_source(one.name), "name", "") == "COMMANDLINE"
        }
        token = _given.set(given)
        try:
            return super().invoke(ctx)
        finally:
            _given.reset(token)


class Group(TyperGroup):
    """A group of commands whose help shows no type next to --help."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the help option, without its type."""
        return _without_type(super().get_help_option(ctx))


def refuse_unused(circumstance: str, *names: str) -> None:
    """Refuse options that the user has given although they have no effect here.

    Args:
        circumstance: when they have none, e.g. "without --judge".
        names: names of the command's parameters.

    Raises:
        SettingsError: an option was given; the message names all that were.
    """
    useless = [_given.get()[name] for name in names if name in _given.get()]
    if useless:
        has, it = ("have", "them") if useless[1:] else ("has", "it")
        raise SettingsError(f"{', '.join(useless)} {has} no effect {circumstance}: drop {it}")


def _without_type(option: Any) -> Any:
    if option is not None:
        option.metavar = ""
    return option
