"""Exceptions raised by safelora-fast.

Every exception that a caller can provoke with bad input derives from :class:`SafeLoraFastError`. Its message is one
line that says what was wrong, where (file, tensor, module) and what to do; the command line prints that line alone and
exits with :attr:`SafeLoraFastError.exit_code`.
"""

from __future__ import annotations

from safelora_fast.printable import one_line

LONGEST = 2000  # characters of a message


class SafeLoraFastError(Exception):
    """Base class of all errors of this package; of a message that quotes something huge, the middle is left out.

    A message is one printable line, whatever the names in it hold.
    """

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        short = message if len(message) <= LONGEST else f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"
        super().__init__(one_line(short))


class CheckpointError(SafeLoraFastError):
    """A checkpoint file, index or tensor cannot be read as it claims to be."""


class AdapterError(SafeLoraFastError):
    """The adapter is of a kind that cannot be projected, or its files are inconsistent."""


class PairingError(SafeLoraFastError):
    """An adapted module has no unambiguous, equally shaped counterpart in the checkpoints."""


class SettingsError(SafeLoraFastError):
    """Options contradict each other or are out of range."""


class DataError(SafeLoraFastError):
    """A row of training data is not as it must be, or leaves nothing to learn."""


class OutputError(SafeLoraFastError):
    """The output cannot be written."""


class MissingDependencyError(SafeLoraFastError):
    """An optional package is needed for what was asked."""


class BackendError(SafeLoraFastError):
    """The backend that was asked for cannot serve an operation on these tensors, or on this machine."""


class TrainingError(SafeLoraFastError):
    """A defence became NaN or infinite while training, or the device ran out of memory."""


class EvaluationError(SafeLoraFastError):
    """Judging a model's answers did not finish."""


class InterruptedRunError(SafeLoraFastError):
    """Ctrl-C stopped a run that can be resumed."""

    exit_code = 130


def how_to_install(extra: str) -> str:
    """`pip install …` with the packages of one of this package's extras, by name, since it is not on the index itself."""
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
