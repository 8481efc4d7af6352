"""The command line inside this process."""

from __future__ import annotations

from command_line import call

__all__ = ["call"]
