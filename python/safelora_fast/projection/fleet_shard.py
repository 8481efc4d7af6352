"""The share of a fleet that one worker projects: given, or read from the variables of a scheduler."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

SHARD = re.compile(r"(?P<index>\d{1,9})?/(?P<count>\d{1,9})")
# Variables with a worker's number from 0, and with the number of workers; None where the scheduler does not tell it.
SCHEDULERS = (
    ("JOB_COMPLETION_INDEX", None),  # an indexed job of Kubernetes
    ("RANK", "WORLD_SIZE"),  # torchrun
    ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
)
SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")


@dataclass(frozen=True)
class Shard:
    """Shard `index` of `count`: the adapters at positions index, index + count, … of the list.

    `source` is the variable that the index came from, or None if it was given.
    """

    index: int = 0
    count: int = 1
    source: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise SettingsError(
                f"shard {self.index}/{self.count}: the first number counts from 0 to {max(self.count - 1, 0)}"
            )

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def failures(self) -> str:
        """The name of the file that lists this shard's failures."""
        return "failed.jsonl" if self.count == 1 else f"failed-{self.index}-of-{self.count}.jsonl"


def parse_shard(text: str | None, environment: Mapping[str, str] = os.environ) -> Shard:
    """Return the shard that a text names, with what it leaves out read from the environment.

    Args:
        text: `I/N`; `/N` for the index from the environment; None for both, and the whole list outside of a scheduler.
        environment: the environment variables.

    Raises:
        SettingsError: the text is not a shard, or the environment does not say which.
    """
    if text is None:
        return _from_environment(environment, None) or Shard()
    match = SHARD.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise SettingsError(f"shard must be I/N, e.g. 0/4 for the first of four, or /N, not {text!r}")
    if match["index"] is not None:
        return Shard(int(match["index"]), int(match["count"]))
    found = _from_environment(environment, int(match["count"]))
    if found is None:
        names = ", ".join([SLURM[0], *(name for name, _ in SCHEDULERS)])
        raise SettingsError(f"shard {text}: none of {names} is set, so it is not known which; give I/N")
    return found


def _from_environment(environment: Mapping[str, str], count: int | None) -> Shard | None:
    if SLURM[0] in environment:
        number, first, last, total = (_number(environment, name) for name in SLURM)
        step = (last - first) / max(total - 1, 1)
        if step and ((number - first) % step or step % 1):
            _refuse(SLURM[0], "the array's numbers are not evenly spaced")
        return Shard(int((number - first) / step) if step else 0, count or total, SLURM[0])
    for name, total_name in SCHEDULERS:
        if name in environment:
            if count is None and (total_name is None or total_name not in environment):
                _refuse(name, "nothing says how many workers there are")
            return Shard(_number(environment, name), count or _number(environment, str(total_name)), name)
    return None


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if re.fullmatch(r"\d{1,9}", text) is None:
        _refuse(name, f"it is {text!r}, not a whole number")
    return int(text)


def _refuse(name: str, why: str) -> NoReturn:
    raise SettingsError(f"{name} is set, but {why}: pass --shard I/N (0/1 for the whole list)")
