"""The training mixture: task examples, optionally with a training-only system prompt, and safe examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.data.inoculate import check_system_turn, with_system_turn
from safelora_fast.data.interleave import SAFE
from safelora_fast.data.rows import LazyRows
from safelora_fast.data.schedule import Schedule
from safelora_fast.data.tokens import Examples
from safelora_fast.errors import DataError
from safelora_fast.files.json_reader import OBJECT, check_fields, read_json

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from safelora_fast.data.rows import Message, Row, RowSet
    from safelora_fast.data.tokens import ExampleSet
    from safelora_fast.recipe.recipe import Recipe

REPORT_SUFFIX = ".selection.json"


def inoculated(recipe: Recipe, rows: RowSet, tokenizer: PreTrainedTokenizerBase) -> RowSet:
    """Add the system prompt from `data.inoculate` to the task's examples, if the recipe sets one.

    Raises:
        SettingsError: the chat template does not support a system turn.
    """
    prompt = recipe.data.inoculate
    if prompt is None:
        return rows
    check_system_turn(tokenizer, prompt)

    def changed(row: Row) -> Row:
        completion = _turns(row.completion, "assistant")
        if row.prompt == []:  # an example of `messages` has all turns in its completion
            return replace(row, completion=with_system_turn(completion, prompt))
        return replace(row, prompt=with_system_turn(_turns(row.prompt, "user"), prompt), completion=completion)

    return replace(rows, rows=LazyRows(len(rows.rows), lambda number: changed(rows.rows[number])))


def _turns(part: str | list[Message], role: str) -> list[Message]:
    return [{"role": role, "content": part}] if isinstance(part, str) else part


def mixed(recipe: Recipe, task: ExampleSet, safe: ExampleSet | None) -> ExampleSet:
    """Return the mixture of task and safe examples for the first epoch.

    Raises:
        DataError: the fraction amounts to less than one safe example.
    """
    section = recipe.data.safe
    if section is None or safe is None:
        return task
    schedule = schedule_of(recipe)
    if not schedule.due(len(task.examples)):
        raise DataError(
            f"{safe.source.source}: data.safe.fraction {section.fraction:g} of {len(task.examples)} task examples "
            "is less than one example; raise it"
        )
    others = (replace(safe.examples[index], safe=True) for index in schedule.orders(len(safe.examples)))
    return replace(task, examples=Examples(example for _, example in schedule.weave([task.examples], others)))


def schedule_of(recipe: Recipe) -> Schedule:
    """Return the schedule of safe examples: their number per task example, and the seed of their order."""
    section, seed = recipe.data.safe, recipe.training["seed"]
    return (
        Schedule(0, seed)
        if section is None
        else Schedule(section.fraction, section.seed if section.seed is not None else seed)
    )


def held_out_warnings(recipe: Recipe, task_sha256: str) -> tuple[str, ...]:
    """Warn about safe examples that `select` chose with an adapter trained on the task's own data (see its report)."""
    section = recipe.data.safe
    if section is None:
        return ()
    try:
        report = check_fields(read_json(Path(f"{section.path}{REPORT_SUFFIX}").expanduser()), {"trained_on": OBJECT})
        names = [name for name, sha256 in report["trained_on"].items() if sha256 == task_sha256]
    except (OSError, ValueError):
        return ()
    return tuple(
        f"{section.path} was chosen with adapter {name}, which was trained on {recipe.data.path}: the choice knows what the "
        f"defense is tested on; choose again with --hold-out {name}"
        for name in names
    )


def to_table(examples: ExampleSet, arguments: SFTConfig, *, tagged: bool) -> Dataset:
    """Return a table of tokens, labels, and a completion mask, which duplicates the labels.

    TRL 0.24 packs only tokens and masks. Tagged examples are packed here because TRL's packing drops the tag.
    """
    import pyarrow
    from datasets import Dataset
    from trl import pack_dataset

    columns: dict[str, Any] = dict(examples.examples.columns())
    if tagged:
        columns[SAFE] = examples.examples.tags() if arguments.packing else pyarrow.array(examples.examples.safe)
    table = Dataset(pyarrow.table(columns))
    if tagged and arguments.packing:
        return pack_dataset(table, arguments.max_length, arguments.packing_strategy)
    return table
