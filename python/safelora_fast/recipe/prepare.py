"""Everything before the weights: arguments, tokens, the model's outline, defences checked against it, and the plan."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from safelora_fast.checkpoints.resolver import find_model
from safelora_fast.data.pairs import builtin_pairs, read_pairs
from safelora_fast.data.rows import chosen_rows, read_rows
from safelora_fast.data.schedule import Epochs
from safelora_fast.data.tokens import Encoder, ExampleSet
from safelora_fast.errors import DataError
from safelora_fast.models.load import load_config, load_tokenizer
from safelora_fast.recipe.adapted_model import outline
from safelora_fast.recipe.mixture import inoculated, mixed, schedule_of
from safelora_fast.recipe.rehearsal import rehearse
from safelora_fast.recipe.run_plan import Facts, Plan, make_plan
from safelora_fast.recipe.trainer_arguments import trainer_arguments
from safelora_fast.scoring.margin import encode_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from safelora_fast.data.pairs import Pair
    from safelora_fast.data.rows import RowSet
    from safelora_fast.recipe.recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """A run that is ready but for its weights.

    Attributes:
        recipe: what was asked for.
        arguments: of the trainer.
        tokenizer: the model's.
        tokenizer_changed: whether the recipe changes it.
        commit: of the model on the Hub, where it comes from there.
        train: the examples trained on; of a recipe with safe rows, the mixture of the first epoch.
        held_out: the examples evaluated on.
        plan: what will be done.
        pairs: those that the margin is measured over; None where it is not measured.
        epochs: the rows of every epoch; None where all have those of the first.
    """

    recipe: Recipe
    arguments: SFTConfig
    tokenizer: PreTrainedTokenizerBase
    tokenizer_changed: bool
    commit: str | None
    train: ExampleSet
    held_out: ExampleSet | None
    plan: Plan
    pairs: list[Pair] | None = None
    epochs: Epochs | None = None


def prepare(recipe: Recipe) -> Prepared:
    """Check a recipe against its data, its model and the installed libraries; no weight is loaded.

    Raises:
        SafeLoraFastError: something does not fit; one line says what and where.
    """
    train_rows, held_out_rows = _rows(recipe)
    arguments = trainer_arguments(recipe)
    config = load_config(recipe.model)
    tokenizer, changed = load_tokenizer(recipe.model)
    encoder = Encoder(
        tokenizer,
        strings=recipe.data.strings,
        completion_only=recipe.training["completion_only_loss"] is not False,
        max_length=arguments.max_length,
        without_answer=recipe.data.without_answer,
        too_long=recipe.data.too_long,
    )
    task = encoder.encode(inoculated(recipe, train_rows, tokenizer))
    held_out = None if held_out_rows is None else encoder.encode(held_out_rows)
    section = recipe.data.safe
    safe = None if section is None else encoder.encode(read_rows(section.path, best=section.top))
    train = mixed(recipe, task, safe)
    epochs = None if safe is None else Epochs.of(task, safe, schedule_of(recipe), arguments)
    pairs = _pairs(recipe, tokenizer)
    model = outline(recipe, config)
    rehearse(recipe, arguments, model, tokenizer, train, held_out)
    sample: str = tokenizer.decode(task.examples[0].answer)
    facts = Facts.of(task, held_out, safe)
    plan = make_plan(recipe, arguments, model, train, facts, sample)
    commit = find_model(recipe.model.path).commit
    return Prepared(recipe, arguments, tokenizer, changed, commit, train, held_out, plan, pairs, epochs)


def _pairs(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Pair] | None:
    """The pairs of the margin, tried on the chat template now rather than when training starts."""
    if recipe.margin is None:
        return None
    pairs = builtin_pairs() if recipe.margin.pairs is None else read_pairs(recipe.margin.pairs)
    encode_pairs(tokenizer, pairs, system=recipe.margin.system, strings=recipe.data.strings)
    return pairs


def _rows(recipe: Recipe) -> tuple[RowSet, RowSet | None]:
    data = recipe.data
    rows = read_rows(data.path, data.max_rows)
    if data.eval is None:
        return rows, None
    if isinstance(data.eval, str):
        return rows, read_rows(data.eval)
    count = max(round(data.eval * len(rows.rows)), 1)
    if count >= len(rows.rows):
        raise DataError(f"{data.path}: holds {len(rows.rows)} rows, too few to hold out {data.eval}")
    chosen = set(random.Random(recipe.training["seed"]).sample(range(len(rows.rows)), count))  # noqa: S311
    others = [number for number in range(len(rows.rows)) if number not in chosen]
    return replace(rows, rows=chosen_rows(rows.rows, others)), replace(
        rows, rows=chosen_rows(rows.rows, sorted(chosen))
    )
