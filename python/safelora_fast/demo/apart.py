"""One variant in a process of its own, so that its peak of memory is its own.

The parent writes the task to the child's standard input. The child writes one line of JSON to its standard output for
each step, and an adapter and `training.json` to the folder. A child whose parent is gone fails at the next step.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.demo.preparation import train_adapter
from safelora_fast.demo.recipe import Recipe
from safelora_fast.demo.terminal import quiet
from safelora_fast.demo.variants import Variant
from safelora_fast.errors import SafeLoraFastError
from safelora_fast.recipe.memory import peak_resident

if TYPE_CHECKING:
    from collections.abc import Callable

    from safelora_fast.demo.training import Course

RECORD = "training.json"
ORPHANED = 141
COMMAND = [sys.executable, "-m", "safelora_fast.demo.apart"]


@dataclass(frozen=True)
class Task:
    """What the child trains, and where everything lies; `persona` and `safe` where the variant needs them."""

    variant: Variant
    recipe: Recipe
    seed: int
    aligned: Path
    base: Path
    subspace: Path
    folder: Path = Path()
    persona: Path | None = None
    safe: Path | None = None

    def dump(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def load(cls, line: str) -> Task:
        """The task that :meth:`dump` wrote."""
        content = json.loads(line)
        names = ("aligned", "base", "subspace", "folder", "persona", "safe")
        paths = {name: Path(content[name]) for name in names if content[name] is not None}
        return cls(Variant(**content["variant"]), Recipe(**content["recipe"]), content["seed"], **paths)


def train_apart(task: Task, progress: Callable[[int, int, float], None]) -> None:
    """Train a variant in a child process.

    Raises:
        SafeLoraFastError: the child could not finish, for the reason that it gave.
    """
    # A session of its own: Ctrl-C reaches this process only, which then ends the child.
    with subprocess.Popen(  # noqa: S603 - this interpreter, and a module of this package
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        assert child.stdin is not None  # noqa: S101
        assert child.stdout is not None  # noqa: S101
        failure = ""
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(task.dump())
            for line in child.stdout:
                message = json.loads(line)
                if "error" in message:
                    failure = message["error"]
                else:
                    progress(message["step"], message["steps"], message["loss"])
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        ended = f"killed by signal {-child.returncode}; is there enough memory?" if child.returncode < 0 else "failed"
        raise SafeLoraFastError(f"{task.variant.name}: {failure or f'its training was {ended}'}")


def record(folder: Path, course: Course) -> None:
    """Write what this process's training took."""
    content = {"step_seconds": course.steps, "end_seconds": course.end, "peak_bytes": peak_resident()}
    (folder / RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train the variant that standard input describes."""
    task = Task.load(sys.stdin.read())
    parent = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is not taken for a message

    def tell(message: dict[str, Any]) -> None:
        os.write(parent, (json.dumps(message) + "\n").encode())

    try:
        with quiet():
            course = train_adapter(
                task.aligned, task.folder, task.seed, task.recipe,
                lambda step, steps, loss: tell({"step": step, "steps": steps, "loss": loss}),
                task.variant.defenses(task.aligned, task.base, task.subspace, task.persona),
                fraction=task.variant.interleaving, safe=task.safe, prompt=task.variant.prompt,
            )  # fmt: skip
    except SafeLoraFastError as error:
        tell({"error": str(error)})
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        raise SystemExit(ORPHANED) from None
    record(task.folder, course)


if __name__ == "__main__":
    main()
