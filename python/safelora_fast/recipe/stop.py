"""The stop rule of a recipe: from its `margin.stop` section and earlier clean runs, and into the record of the run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.configuration.defense_section import MONITORS
from safelora_fast.errors import SettingsError
from safelora_fast.files.json_reader import why
from safelora_fast.files.store import changed_settings, changes_text, plain
from safelora_fast.recipe.model_stamp import recipe_stamp
from safelora_fast.recipe.run_folder import RECORD, read_record
from safelora_fast.scoring.stop_rule import StopRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safelora_fast.configuration.yaml_document import Document
    from safelora_fast.recipe.recipe import Recipe

KEYS = ("margin", "stop")


def stop_rule(recipe: Recipe) -> StopRule | None:
    """Return the rule that a recipe asks for; its monitors are watched too. None if it asks for none.

    Raises:
        SettingsError: a setting is out of range, or a clean run cannot be used; the message names the line.
    """
    section = None if recipe.margin is None else recipe.margin.stop
    if section is None:
        return None
    folders = [Path(folder).expanduser().resolve() for folder in section.clean]
    if len(set(folders)) < len(folders):
        raise recipe.document.problem((*KEYS, "clean"), "names a run twice; each clean run counts once")
    watched = plain(_watched(recipe.resolved(), recipe_stamp(recipe))) if folders else {}
    clean = [_highest(recipe.document, Path(folder).expanduser(), watched) for folder in section.clean]
    if recipe.training.get("load_best_model_at_end"):
        raise recipe.document.problem(
            KEYS, "training.load_best_model_at_end would replace the kept weights; turn one off"
        )
    if section.after_task and recipe.training.get("eval_strategy", "no") in ("no", False):
        raise recipe.document.problem((*KEYS, "after_task"), "needs held-out losses; say training.eval_strategy")
    try:
        monitors = [spec.build() for spec in recipe.monitors]
        return StopRule(section.alpha, section.limits, monitors, clean, section.after_task)
    except SettingsError as error:
        raise recipe.document.problem(KEYS, str(error).removeprefix("stop: ")) from error


def _watched(settings: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the signals of a run depend on. A file's digest takes the place of its path, so it may move.

    Args:
        settings: those of the recipe.
        files: digests by dotted name, see :func:`~safelora_fast.recipe.model_stamp.recipe_stamp`.
    """
    margin, data = settings.get("margin") or {}, settings.get("data") or {}
    named = {f"margin.{key}": margin.get(key) for key in ("every", "pairs", "system")}
    for name, monitor in (settings.get(MONITORS) or {}).items():
        named |= {f"{MONITORS}.{name}.{key}": value for key, value in monitor.items()}
    digests = {key: files.get(key, value) for key, value in named.items()}
    return {**digests, "data.strings": data.get("strings"), "model": files.get("model")}


def _highest(document: Document, folder: Path, watched: Mapping[str, Any]) -> dict[str, float]:
    """Return the highest values that a clean run has reached; it must have been watched as this one will be."""
    where, again = (*KEYS, "clean"), "train it with margin.stop and no alarm"
    try:
        record = read_record(folder / RECORD)
    except (OSError, ValueError) as error:
        raise document.problem(where, f"{folder / RECORD}: {why(error)}; {again}") from error
    stop = record.get("stop") or {}
    if record.get("finished") is not True or not stop.get("highest") or stop.get("alarm") is not None:
        raise document.problem(where, f"{folder}: is not a finished run that was watched to its end; {again}")
    changed = changed_settings(plain(_watched(record.get("recipe") or {}, record.get("input") or {})), watched)
    if changed:
        raise document.problem(where, f"{folder}: was watched in another way: {changes_text(changed)}; {again}")
    return {name: float(value) for name, value in stop["highest"].items()}


def stop_record(trainer: Any) -> dict[str, Any] | None:
    """Return the highest value of each signal and the alarm, if there was one; None without a stop rule."""
    from safelora_fast.scoring.margin_callback import MarginCallback

    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, MarginCallback) and one.highest]
    if not found:
        return None
    return {"highest": dict(found[0].highest), "alarm": None if found[0].alarm is None else asdict(found[0].alarm)}
