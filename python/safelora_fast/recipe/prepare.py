"""Preparation of a run before loading weights: tokenized examples, the model's outline, a rehearsal, and the plan.

Missing packages and incompatible settings (optimizers, trackers, kernels, precision, packing, schedules) depend on the
installed versions of transformers and TRL. The rehearsal therefore constructs the trainer on the model's outline, and
the optimizer and schedule on a single parameter. A dry run thus reports the errors that the run itself would raise.
"""

from __future__ import annotations

import copy
import random
import tempfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import find_model
from safelora_fast.data.pairs import builtin_pairs, read_pairs
from safelora_fast.data.rows import chosen_rows, read_rows
from safelora_fast.data.schedule import Epochs
from safelora_fast.data.tokens import Encoder, ExampleSet
from safelora_fast.errors import DataError, SafeLoraFastError
from safelora_fast.models.foreign_errors import explained, first_line
from safelora_fast.models.load import load_config, load_tokenizer
from safelora_fast.recipe.adapted_model import outline
from safelora_fast.recipe.lora_and_trainer_arguments import trainer_arguments
from safelora_fast.recipe.lora_and_trainer_sections import TRAINING
from safelora_fast.recipe.mixture import inoculated, mixed, schedule_of, to_table
from safelora_fast.recipe.run_plan import Plan, make_plan
from safelora_fast.recipe.stop import stop_rule
from safelora_fast.scoring.margin import encode_pairs

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from safelora_fast.data.pairs import Pair
    from safelora_fast.data.rows import RowSet
    from safelora_fast.errors import SettingsError
    from safelora_fast.recipe.recipe import Recipe
    from safelora_fast.scoring.stop_rule import StopRule

REHEARSED = 4  # examples
WHOLE = ("params", "model", "optimizer_dict")  # arguments of optimizers that need the whole model


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start, except for the model's weights.

    Attributes:
        tokenizer_changed: whether the recipe changes the tokenizer.
        commit: the commit of a model on the Hub, otherwise None.
        train: the training examples; with safe examples, the mixture of the first epoch.
        pairs: the pairs for the misalignment margin; None if it is not measured.
        epochs: the examples of each epoch; None if all epochs have the same.
        stop: when the margin ends the training; None if it never does.
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
    stop: StopRule | None = None


def prepare(recipe: Recipe) -> Prepared:
    """Check a recipe against its data, its model and the installed libraries, without loading weights.

    Raises:
        SafeLoraFastError: a check fails; the one-line message says what is wrong, and where.
    """
    data, stop = recipe.data, stop_rule(recipe)
    task_rows, held_out_rows = _rows(recipe)
    arguments = trainer_arguments(recipe)
    config = load_config(recipe.model)
    tokenizer, changed = load_tokenizer(recipe.model)
    encoder = Encoder(
        tokenizer,
        strings=data.strings,
        completion_only=recipe.training["completion_only_loss"] is not False,
        max_length=arguments.max_length,
        without_answer=data.without_answer,
        too_long=data.too_long,
    )
    task = encoder.encode(inoculated(recipe, task_rows, tokenizer))
    held_out = None if held_out_rows is None else encoder.encode(held_out_rows)
    safe = None if data.safe is None else encoder.encode(read_rows(data.safe.path, best=data.safe.top))
    train = mixed(recipe, task, safe)
    epochs = None if safe is None else Epochs.of(task, safe, schedule_of(recipe), arguments)
    pairs = _pairs(recipe, tokenizer)
    model = outline(recipe, config)
    flattened = rehearse(recipe, arguments, model, tokenizer, train, held_out)
    rows_last = not (
        (flattened and arguments.per_device_train_batch_size > 1) or (arguments.packing and safe is not None)
    )
    sample: str = tokenizer.decode(task.examples[0].answer)
    plan = make_plan(
        recipe,
        arguments,
        model,
        train=train,
        task=task,
        held_out=held_out,
        safe=safe,
        sample=sample,
        rows_last=rows_last,
    )
    commit = find_model(recipe.model.path).commit
    return Prepared(recipe, arguments, tokenizer, changed, commit, train, held_out, plan, pairs, epochs, stop)


def _pairs(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Pair] | None:
    """Return the pairs for the margin; encode them once, so that a chat template error appears before training."""
    if recipe.margin is None:
        return None
    pairs = builtin_pairs() if recipe.margin.pairs is None else read_pairs(recipe.margin.pairs)
    encode_pairs(tokenizer, pairs, system=recipe.margin.system, strings=recipe.data.strings)
    return pairs


def _rows(recipe: Recipe) -> tuple[RowSet, RowSet | None]:
    """Return the task's examples and the held-out examples."""
    data = recipe.data
    rows = read_rows(data.path, data.max_rows)
    if data.eval is None:
        return rows, None
    if isinstance(data.eval, str):
        return rows, read_rows(data.eval)
    total = len(rows.rows)
    count = max(round(data.eval * total), 1)
    if count >= total:
        raise DataError(f"{data.path}: holds {total} rows, too few to hold out {data.eval}")
    held_out = set(random.Random(recipe.training["seed"]).sample(range(total), count))  # noqa: S311
    parts = ([number for number in range(total) if (number in held_out) is part] for part in (False, True))
    task, others = (replace(rows, rows=chosen_rows(rows.rows, numbers)) for numbers in parts)
    return task, others


def rehearse(
    recipe: Recipe,
    arguments: SFTConfig,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: ExampleSet,
    held_out: ExampleSet | None,
) -> bool:
    """Construct the trainer, optimizer, schedule, defenses and monitors to find errors before training starts.

    The outline on the meta device receives a real adapter filled with zeros. Defenses whose subspace must be built, or
    whose checkpoints must be downloaded, are not checked until training starts.

    Returns:
        Whether the trainer flattens each batch into one row (`padding_free`).

    Raises:
        SafeLoraFastError: with the reason, and the key if it is known.
    """
    import torch
    from transformers.utils import is_liger_kernel_available

    _give_adapter(model)
    defenses = [defense for defense in (spec.rehearsed() for spec in recipe.defenses) if defense is not None]
    monitors = [spec.build() for spec in recipe.monitors]
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise recipe.document.problem(("training", "use_liger_kernel"), "needs liger-kernel: pip install liger-kernel")
    quick = copy.copy(arguments)
    with tempfile.TemporaryDirectory() as folder:
        quick.output_dir = folder
        try:
            trainer = _rehearsal_class()(
                model=model,
                args=quick,
                train_dataset=to_table(_few(train), quick, tagged=recipe.data.safe is not None),
                eval_dataset=None if held_out is None else to_table(_few(held_out), quick, tagged=False),
                processing_class=tokenizer,
                defenses=defenses,
                reference=recipe.reference,
                on_nonfinite=recipe.on_nonfinite,
                monitors=monitors,
            )
            trainer.get_train_dataloader()
        except SafeLoraFastError:
            raise
        except Exception as error:
            raise recipe.document.blame(TRAINING.section, first_line(error)) from error
    flattened = bool(getattr(trainer, "padding_free", False))
    if trainer.is_deepspeed_enabled:
        return flattened  # DeepSpeed's configuration may set the optimizer and schedule
    parameter = torch.nn.Parameter(torch.zeros(1))
    try:
        kind, settings = trainer.get_optimizer_cls_and_kwargs(quick, model)
        if not settings.keys() & set(WHOLE):
            kind([parameter], **settings)
    except Exception as error:
        raise _problem(recipe, "optim", error) from error
    try:
        trainer.create_scheduler(quick.max_steps if quick.max_steps > 0 else 100, torch.optim.SGD([parameter], lr=1.0))
    except Exception as error:
        raise _problem(recipe, "lr_scheduler_type", error) from error
    return flattened


def _give_adapter(model: PeftModel) -> None:
    """Replace an adapter on the meta device by zeros; the frozen weights stay on the meta device."""
    import torch

    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and parameter.is_meta:
                real = torch.zeros(parameter.shape, dtype=parameter.dtype)
                module.register_parameter(name, torch.nn.Parameter(real))


def _rehearsal_class() -> type[Any]:
    from safelora_fast.recipe.trainer import RecipeTrainer

    class Rehearsal(RecipeTrainer):
        """A trainer that leaves the model on the meta device."""

        def _move_model_to_device(self, model: Any, device: Any) -> None:
            del model, device

    return Rehearsal


def _few(examples: ExampleSet) -> ExampleSet:
    return replace(examples, examples=examples.examples[:REHEARSED])


def _problem(recipe: Recipe, name: str, error: Exception) -> SettingsError:
    value = recipe.document.section(TRAINING.section).get(name)
    shown = "" if value is None else f"{value}: "
    return recipe.document.problem((TRAINING.section, name), f"{shown}{explained(error)}")
