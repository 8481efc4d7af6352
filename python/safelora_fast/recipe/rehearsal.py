"""A trainer put together as the run's will be, but on the model's outline: what a run would refuse, a dry run refuses.

What is missing or does not go together (packages of optimizers, trackers and kernels, precision, packing, schedules) is known
to transformers and TRL, by version. So they are asked: the trainer is made, its optimizer and its schedule on one parameter.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import SafeLoraFastError
from safelora_fast.models.foreign_errors import explained
from safelora_fast.recipe.adapted_model import give_adapter
from safelora_fast.recipe.defense_section import Subspaces, is_at_hand
from safelora_fast.recipe.mixture import to_table
from safelora_fast.recipe.trainer_arguments import refused

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from safelora_fast.data.tokens import ExampleSet
    from safelora_fast.errors import SettingsError
    from safelora_fast.recipe.recipe import Recipe

ROWS = 4
WHOLE = ("params", "model", "optimizer_dict")  # arguments of optimizers that look at the whole model


def rehearse(
    recipe: Recipe,
    arguments: SFTConfig,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: ExampleSet,
    held_out: ExampleSet | None,
) -> None:
    """Refuse what the trainer, its optimizer, its schedule, defenses or monitors would refuse when training starts.

    A defense whose subspace is yet to be built, or whose sources are to be fetched, is left to the start of training.

    Args:
        recipe: the checked recipe.
        arguments: of the trainer.
        model: its outline on the meta device, which is given a real adapter of zeros.
        tokenizer: the model's.
        train: the rows, of which a few are taken.
        held_out: likewise.

    Raises:
        SafeLoraFastError: with the reason, and the key where that is known.
    """
    import torch
    from transformers.utils import is_liger_kernel_available

    give_adapter(model)
    known, subspaces = [spec for spec in recipe.defenses if is_at_hand(spec)], Subspaces(build=True)
    defenses, monitors = [spec.build(subspaces) for spec in known], [spec.build() for spec in recipe.monitors]
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise recipe.document.problem(("training", "use_liger_kernel"), "needs liger-kernel: pip install liger-kernel")
    quick = copy.copy(arguments)
    with tempfile.TemporaryDirectory() as folder:
        quick.output_dir = folder
        try:
            trainer = _trainer_class()(
                model=model,
                args=quick,
                train_dataset=to_table(_few(train), quick, tagged=recipe.data.safe is not None),
                eval_dataset=None if held_out is None else to_table(_few(held_out), quick, tagged=False),
                processing_class=tokenizer,
                defenses=defenses,
                on_nonfinite=recipe.on_nonfinite,
                monitors=monitors,
            )
            trainer.get_train_dataloader()
        except SafeLoraFastError:
            raise
        except Exception as error:
            raise refused(recipe, error) from error
    if trainer.is_deepspeed_enabled:
        return  # its own configuration may say which optimizer and schedule
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


def _trainer_class() -> type[Any]:
    from safelora_fast.recipe.trainer import RecipeTrainer

    class Rehearsal(RecipeTrainer):
        """Leaves the outline, which has no weights to move, where it is."""

        def _move_model_to_device(self, model: Any, device: Any) -> None:
            del model, device

    return Rehearsal


def _few(examples: ExampleSet) -> ExampleSet:
    return replace(examples, examples=examples.examples[:ROWS])


def _problem(recipe: Recipe, name: str, error: Exception) -> SettingsError:
    value = recipe.document.section("training").get(name)
    shown = "" if value is None else f"{value}: "
    return recipe.document.problem(("training", name), f"{shown}{explained(error)}")
