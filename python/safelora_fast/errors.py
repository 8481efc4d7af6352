"""Exceptions raised by safelora-fast.

Every error that bad input can cause derives from :class:`SafeLoraFastError`. Its message is one line: what is wrong,
where (file, tensor, module) and what to do. The command line prints only that line and exits with
:attr:`SafeLoraFastError.exit_code`.
"""

from __future__ import annotations

from safelora_fast.printable import one_line

LONGEST = 2000  # characters of a message


class SafeLoraFastError(Exception):
    """Base class of all errors of this package. A message is one printable line; very long ones are shortened."""

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        short = message if len(message) <= LONGEST else f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"
        super().__init__(one_line(short))


class CheckpointError(SafeLoraFastError):
    """A checkpoint's file, index or tensor cannot be read."""


class AdapterError(SafeLoraFastError):
    """The adapter cannot be projected, or its files are inconsistent."""


class PairingError(SafeLoraFastError):
    """A module has no unambiguous counterpart of the same shape in the checkpoints."""


class SettingsError(SafeLoraFastError):
    """Options contradict each other or are out of range."""


class DataError(SafeLoraFastError):
    """An example or a data file is invalid, or leaves nothing to learn."""


class OutputError(SafeLoraFastError):
    """The output cannot be written."""


class StoreError(SafeLoraFastError):
    """A remote store cannot be read or written."""


class MissingDependencyError(SafeLoraFastError):
    """An optional package is missing."""


class BackendError(SafeLoraFastError):
    """The requested backend cannot run an operation on these tensors, or on this machine."""


class TrainingError(SafeLoraFastError):
    """A defense became NaN or infinite during training, or the device ran out of memory."""


class EvaluationError(SafeLoraFastError):
    """An evaluation did not finish."""


class InterruptedRunError(SafeLoraFastError):
    """Ctrl-C stopped a run that can be resumed."""

    exit_code = 130


def how_to_install(extra: str) -> str:
    """Return a `pip install …` command with the packages of an extra, since this package is not on the index."""
    import importlib.metadata
    import re

    try:
        requirements = importlib.metadata.requires("safelora-fast") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    named = [text.partition(";")[0].strip() for text in requirements if re.search(rf"extra == ['\"]{extra}['\"]", text)]
    if not named:
        return f"pip install '.[{extra}]' in a clone"
    return f"pip install {' '.join(map(repr, named))}"
