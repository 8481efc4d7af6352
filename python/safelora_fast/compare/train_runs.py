"""Trains each run with `safelora-fast train` in its own process, so that one failure does not affect the others."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast import _core
from safelora_fast.checkpoints.adapter import WEIGHTS
from safelora_fast.compare.comparison import runs_of
from safelora_fast.compare.measures import MEASURES
from safelora_fast.compare.report import NOT_TRAINED
from safelora_fast.compare.runs import OPERATOR_SWAP, TRAINING_FAILURE, read_json_file
from safelora_fast.errors import CheckpointError, InterruptedRunError, OutputError
from safelora_fast.files.digest import digest, text_digest
from safelora_fast.files.output import described
from safelora_fast.files.store import write_json
from safelora_fast.files.yaml_reader import dump_yaml
from safelora_fast.recipe.model_stamp import recipe_stamp
from safelora_fast.recipe.run_folder import RECORD, RunFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safelora_fast.compare.comparison import CompareConfig
    from safelora_fast.compare.runs import Run
    from safelora_fast.recipe.recipe import Recipe

COMMAND = [sys.executable, "-m", "safelora_fast", "train", "--end-with-stdin"]
RECIPE = "recipe.yaml"
LINES_KEPT = 20
DAMAGED = "the adapter of this run is gone or damaged"


@dataclass(frozen=True)
class Training:
    """A run that is trained here.

    Attributes:
        run: the run; its adapter folder is the recipe's output.
        recipe: recipe of the run.
        title: title shown to users.
    """

    run: Run
    recipe: Recipe
    title: str

    @property
    def kind(self) -> tuple[str, bool]:
        """The defense, and whether it is trained for a measure: what all seeds share."""
        return self.run.name, self.run.folder.name == OPERATOR_SWAP

    def changes(self) -> str | None:
        """Return how the existing run differs from this recipe, data and model; None if it matches or is missing."""
        folder = RunFolder(self.recipe)
        try:
            record = folder.read_record()
        except OutputError:
            return "the record of this run cannot be read"
        if not record:
            return None
        settings = folder.changes(self.recipe.resolved(), "recipe")
        if settings is not None:
            return f"the recipe has changed since this run was trained: {settings}"
        known = record.get("data") or {}
        for name, source in _data_files(self.recipe).items():
            if name in known and known[name] != digest(source):
                return f"{source} has changed since this run was trained"
        inputs = folder.changes(recipe_stamp(self.recipe), "input") if "input" in record else None
        return None if inputs is None else f"the model or a file has changed since this run was trained: {inputs}"

    def has_ended(self) -> bool:
        """Return whether a training ran to its end, even if its files or settings have changed since."""
        return bool(read_json_file(RunFolder(self.recipe).path / RECORD).get("finished"))

    def is_finished(self) -> bool:
        """Return whether the run is complete and matches its recipe."""
        return self.changes() is None and self.has_ended() and _is_whole(RunFolder(self.recipe).path)

    def is_recorded(self) -> bool:
        """Return whether a finished run matches its recipe, but only its record is here, without the adapter's weights."""
        return self.run.is_without_weights() and self.run.recorded_adapter() is not None and self.changes() is None

    def failure(self) -> str | None:
        """Return why the latest training of this recipe failed; None if it succeeded, or if another recipe's failed."""
        content = read_json_file(self.run.folder / TRAINING_FAILURE)
        failure: str | None = content.get("failure")
        return failure if content.get("recipe") == self._digest() else None

    def missing(self) -> str | None:
        """Return why there is no complete run of the current recipe, nor the record of one; None if there is."""
        if self.is_finished() or self.is_recorded():
            return None
        return self.failure() or self.changes() or (DAMAGED if self.has_ended() else NOT_TRAINED)

    def _digest(self) -> str:
        """Return a digest of the recipe without its output folder."""
        settings = {name: section for name, section in self.recipe.resolved().items() if name != "output"}
        return text_digest(settings)

    def check_folder(self, *, overwrite: bool) -> None:
        """Check that the folder holds nothing else, and no run of another recipe unless `overwrite` is set.

        Raises:
            OutputError: with the reason.
        """
        folder = RunFolder(self.recipe)
        folder.check(resume=False, overwrite=True)
        changed = None if overwrite else self.changes()
        if changed is not None:
            raise OutputError(f"{folder.path}: {changed}; put it back, or pass --overwrite to start anew")

    def train(self, *, overwrite: bool, talk: bool) -> str | None:
        """Train or resume the run; return the reason if it failed.

        Args:
            overwrite: start over if the recipe has changed.
            talk: show training progress on standard error.

        Raises:
            OutputError: the folder cannot be written.
            InterruptedRunError: Ctrl-C; the last checkpoint is kept.
        """
        folder = self.run.folder
        if self.is_finished():
            (folder / TRAINING_FAILURE).unlink(missing_ok=True)
            return None
        with described(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RECIPE).write_text(dump_yaml(self.recipe.document.values), encoding="utf-8")
            (folder / TRAINING_FAILURE).unlink(missing_ok=True)
        anew = self.has_ended() or (overwrite and self.changes() is not None)
        failure = _run([*COMMAND, str(folder / RECIPE), "--overwrite" if anew else "--resume"], talk=talk)
        if failure is not None:
            write_json(folder / TRAINING_FAILURE, {"failure": failure, "recipe": self._digest()})
        return failure


def trainings_of(config: CompareConfig) -> Iterator[Training]:
    """Yield every run that is trained here, then the trainings that only a measure needs."""
    runs = [(spec, run) for spec in config.runs if not spec.adapters for run in runs_of(config, spec)]
    for spec, run in runs:
        yield Training(run, config.recipe_for(spec, run), run.label)
    for measure in MEASURES:
        changes = measure.training(config)
        for spec, run in runs if changes is not None else ():
            if measure.applies(run, config):
                own = measure.measured_run(run)
                yield Training(own, config.recipe_for(spec, own, changes), f"{run.label}, on {measure.title}")


def _data_files(recipe: Recipe) -> dict[str, Path]:
    """Return the local data files of a run, by their names in its record."""
    data = recipe.data
    named = {"train": data.path, "held_out": data.eval, "safe": data.safe.path if data.safe else None}
    paths = {name: Path(source).expanduser() for name, source in named.items() if isinstance(source, str)}
    return {name: path for name, path in paths.items() if path.is_file()}


def _is_whole(adapter: Path) -> bool:
    """Return whether the files of an adapter exist and are not truncated."""
    try:
        _core.SafetensorsFile(str(adapter / WEIGHTS))
    except CheckpointError:
        return False
    return bool(read_json_file(adapter / "adapter_config.json"))


def _run(command: list[str], *, talk: bool) -> str | None:
    # Own session: Ctrl-C reaches only this process, which forwards it. Pipe: the child ends if this process is killed.
    with subprocess.Popen(  # noqa: S603 - this interpreter, and a command of this package
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as child:
        last: deque[str] = deque(maxlen=LINES_KEPT)
        reader = threading.Thread(target=_listen, args=(child.stderr, last, talk), daemon=True)
        reader.start()
        with _signals_passed_on(child) as received:
            while True:
                try:
                    code = child.wait()
                    break
                except KeyboardInterrupt:
                    child.send_signal(signal.SIGINT)
        reader.join()
    if received:
        raise SystemExit(128 + received[0])
    if code in {InterruptedRunError.exit_code, -signal.SIGINT}:
        raise InterruptedRunError("interrupted; what is trained is kept: the same command goes on")
    if code == 0:
        return None
    if code < 0:
        return f"the training was killed by signal {-code}; is there enough memory?"
    said = next((line.removeprefix("error: ") for line in reversed(last) if line.startswith("error: ")), None)
    return said or (last[-1] if last else f"the training ended with {code} and said nothing")


@contextlib.contextmanager
def _signals_passed_on(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Forward termination signals to the training; yields the list of received signals."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def end(number: int, _frame: Any) -> None:
        received.append(number)
        child.send_signal(number)  # do nothing else: the interrupted code may hold the child's lock

    former = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.kill()


def _listen(stream: Any, last: deque[str], talk: bool) -> None:
    for line in iter(stream.readline, b""):
        text = line.decode(errors="replace").rstrip()
        if text:
            last.append(text)
        if talk and not text.startswith("error: "):
            print(text, file=sys.stderr, flush=True)
