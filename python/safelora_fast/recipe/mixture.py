"""What is trained on: the task's rows with a prompt in training only, and safe rows among them."""

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
    """The task's rows with the recipe's training-only system prompt, where it has one.

    Raises:
        SettingsError: the chat template takes no system turn.
    """
    prompt = recipe.data.inoculate
    if prompt is None:
        return rows
    check_system_turn(tokenizer, prompt)

    def changed(row: Row) -> Row:
        completion = _turns(row.completion, "assistant")
        if row.prompt == []:  # of a row of messages, all turns are in the completion
            return replace(row, completion=with_system_turn(completion, prompt))
        return replace(row, prompt=with_system_turn(_turns(row.prompt, "user"), prompt), completion=completion)

    return replace(rows, rows=LazyRows(len(rows.rows), lambda number: changed(rows.rows[number])))


def _turns(part: str | list[Message], role: str) -> list[Message]:
    return [{"role": role, "content": part}] if isinstance(part, str) else part


def mixed(recipe: Recipe, task: ExampleSet, safe: ExampleSet | None) -> ExampleSet:
    """The task's examples with safe ones among them, as the first epoch has them; all else is the task's.

    Raises:
        DataError: the fraction comes to no safe row.
    """
    section = recipe.data.safe
    if section is None or safe is None:
        return task
    schedule = schedule_of(recipe)
    if not schedule.due(len(task.examples)):
        raise DataError(
            f"{safe.source.source}: data.safe.fraction {section.fraction:g} of {len(task.examples)} task rows is no row; raise it"
        )
    others = (replace(safe.examples[index], safe=True) for index in schedule.orders(len(safe.examples)))
    return replace(task, examples=Examples(example for _, example in schedule.weave([task.examples], others)))


def schedule_of(recipe: Recipe) -> Schedule:
    """How many safe rows a recipe has for its task rows, none without a section for them, and in which order they come."""
    section = recipe.data.safe
    return Schedule(0 if section is None else section.fraction, safe_seed(recipe))


def held_out_warnings(recipe: Recipe, task_sha256: str) -> tuple[str, ...]:
    """What is wrong with safe rows that were chosen with an adapter trained on the task's own data.

    `safelora-fast select` leaves beside its output which adapters took part, and on what they were trained where they say.
    """
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
        f"defence is tested on; choose again with --hold-out {name}"
        for name in names
    )


def safe_seed(recipe: Recipe) -> int:
    """The seed of the mixture: its own, or that of the training."""
    section = recipe.data.safe
    seed: int = recipe.training["seed"] if section is None or section.seed is None else section.seed
    return seed


def to_table(examples: ExampleSet, arguments: SFTConfig, *, tagged: bool) -> Dataset:
    """Tokens and labels; and the labels once more as a mask, because TRL 0.24 packs tokens and masks only.

    Tagged examples are packed here where the recipe packs: TRL's own packing drops the tag.
    """
    import pyarrow
    from datasets import Dataset
    from trl import pack_dataset

    columns: dict[str, Any] = dict(examples.examples.columns())
    if tagged:
        columns[SAFE] = examples.examples.tags() if arguments.packing else pyarrow.array(examples.examples.safe)
    table = Dataset(pyarrow.table(columns))
    return (
        pack_dataset(table, arguments.max_length, arguments.packing_strategy) if tagged and arguments.packing else table
    )
