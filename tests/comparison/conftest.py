"""The command line inside this process, for every test of this folder that asks for it."""

from command_line import call

__all__ = ["call"]
