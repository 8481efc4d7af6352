"""Training the runs, each by `safelora-fast train` in a process of its own, so that one that fails takes no other with it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast import _core
from safelora_fast.checkpoints.adapter import WEIGHTS
from safelora_fast.compare.paths import FAILURE, keep, read
from safelora_fast.errors import CheckpointError, InterruptedRunError, OutputError
from safelora_fast.files.digest import digest, text_digest
from safelora_fast.files.output import described
from safelora_fast.files.yaml_reader import dump_yaml
from safelora_fast.recipe.model_stamp import recipe_stamp
from safelora_fast.recipe.run_folder import RECORD, RunFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safelora_fast.compare.paths import Place
    from safelora_fast.recipe.recipe import Recipe

COMMAND = [sys.executable, "-m", "safelora_fast", "train", "--end-with-stdin"]
RECIPE = "recipe.yaml"
REMEMBERED = 20


def changes(recipe: Recipe) -> str | None:
    """Why a run that is there is not the one of this recipe, these data, model and files; None where it is, or there is none."""
    folder = RunFolder(recipe)
    try:
        record = folder.read_record()
    except OutputError:
        return "the record of this run cannot be read"
    if not record:
        return None
    settings = folder.changes(recipe.resolved(), "recipe")
    if settings is not None:
        return f"the recipe has changed since this run was trained: {settings}"
    known = record.get("data") or {}
    for name, source in _files(recipe).items():
        if name in known and known[name] != digest(source):
            return f"{source} has changed since this run was trained"
    inputs = folder.changes(recipe_stamp(recipe), "input") if "input" in record else None
    return None if inputs is None else f"the model or a file has changed since this run was trained: {inputs}"


def check_folder(recipe: Recipe, *, overwrite: bool) -> None:
    """Refuse a folder that holds something else, or a run of another recipe that is not to be overwritten.

    Raises:
        OutputError: with the reason.
    """
    folder = RunFolder(recipe)
    folder.check(resume=False, overwrite=True)
    changed = None if overwrite else changes(recipe)
    if changed is not None:
        raise OutputError(f"{folder.path}: {changed}; put it back, or pass --overwrite to start anew")


def _files(recipe: Recipe) -> dict[str, Path]:
    """The local files that a run reads, by their names in its record."""
    data = recipe.data
    named = {"train": data.path, "held_out": data.eval, "safe": data.safe.path if data.safe else None}
    paths = {name: Path(source).expanduser() for name, source in named.items() if isinstance(source, str)}
    return {name: path for name, path in paths.items() if path.is_file()}


def is_finished(recipe: Recipe) -> bool:
    """Whether the run of a recipe is there as a whole."""
    return changes(recipe) is None and has_ended(recipe) and _is_whole(RunFolder(recipe).path)


def has_ended(recipe: Recipe) -> bool:
    """Whether there is a run that trained to its end, whatever has become of its files and settings since."""
    return bool(read(RunFolder(recipe).path / RECORD).get("finished"))


def _is_whole(adapter: Path) -> bool:
    """Whether the files of an adapter are there, and none is cut off."""
    try:
        _core.SafetensorsFile(str(adapter / WEIGHTS))
    except CheckpointError:
        return False
    return bool(read(adapter / "adapter_config.json"))


def failure_of(place: Place, recipe: Recipe) -> str | None:
    """Why the latest training of a recipe came to nothing; None where it did not fail, or where another recipe's did."""
    content = read(place.folder / FAILURE)
    failure: str | None = content.get("failure")
    return failure if content.get("recipe") == _name(recipe) else None


def _name(recipe: Recipe) -> str:
    """The same for recipes that differ in where their output lies alone."""
    settings = {name: section for name, section in recipe.resolved().items() if name != "output"}
    return text_digest(settings)


def train(place: Place, recipe: Recipe, *, overwrite: bool, talk: bool) -> str | None:
    """Train a run, or go on with it; returns why it failed.

    Args:
        place: of the run.
        recipe: whose output is the place's adapter.
        overwrite: begin anew where the recipe has changed.
        talk: show on standard error how far the training is.

    Raises:
        OutputError: the folder cannot be written.
        InterruptedRunError: Ctrl-C; the training has kept its last checkpoint.
    """
    if is_finished(recipe):
        (place.folder / FAILURE).unlink(missing_ok=True)
        return None
    with described(place.folder):
        place.folder.mkdir(parents=True, exist_ok=True)
        (place.folder / RECIPE).write_text(dump_yaml(recipe.document.values), encoding="utf-8")
        (place.folder / FAILURE).unlink(missing_ok=True)
    anew = has_ended(recipe) or (overwrite and changes(recipe) is not None)
    failure = _run([*COMMAND, str(place.folder / RECIPE), "--overwrite" if anew else "--resume"], talk=talk)
    if failure is not None:
        keep(place.folder / FAILURE, {"failure": failure, "recipe": _name(recipe)})
    return failure


def _run(command: list[str], *, talk: bool) -> str | None:
    # A session of its own: Ctrl-C reaches this process only, which passes it on. A pipe: it ends when this process is killed.
    with subprocess.Popen(  # noqa: S603 - this interpreter, and a command of this package
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as child:
        last: deque[str] = deque(maxlen=REMEMBERED)
        reader = threading.Thread(target=_listen, args=(child.stderr, last, talk), daemon=True)
        reader.start()
        with _passing_on(child) as told:
            while True:
                try:
                    code = child.wait()
                    break
                except KeyboardInterrupt:
                    child.send_signal(signal.SIGINT)
        reader.join()
    if told:
        raise SystemExit(128 + told[0])
    if code in {InterruptedRunError.exit_code, -signal.SIGINT}:
        raise InterruptedRunError("interrupted; what is trained is kept: the same command goes on")
    if code == 0:
        return None
    if code < 0:
        return f"the training was killed by signal {-code}; is there enough memory?"
    said = next((line.removeprefix("error: ") for line in reversed(last) if line.startswith("error: ")), None)
    return said or (last[-1] if last else f"the training ended with {code} and said nothing")


@contextlib.contextmanager
def _passing_on(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """When this process is told to end, so is the training; yields the signals that came."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def end(number: int, _frame: Any) -> None:
        told.append(number)
        child.send_signal(number)  # and no more: the code in hand may hold the child's lock

    former = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield told
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
