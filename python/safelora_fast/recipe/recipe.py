"""A recipe: one YAML file that says what is trained on what, how, and with which defences; checked as a whole."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safelora_fast.checkpoints.resolver import did_you_mean
from safelora_fast.models.load import ModelSection
from safelora_fast.recipe.defense_section import ON_NONFINITE, SECTION, DefenseSpec, read_defenses
from safelora_fast.recipe.lora_and_trainer_sections import LORA, TRAINING
from safelora_fast.recipe.monitor_section import MONITORS, MonitorSpec, read_monitors
from safelora_fast.recipe.sections import DataSection, MarginSection, OutputSection
from safelora_fast.recipe.signatures import check_packages
from safelora_fast.recipe.value_types import conforms, describe
from safelora_fast.recipe.yaml_document import Document, read_document
from safelora_fast.recipe.yaml_section import read_section

if TYPE_CHECKING:
    from collections.abc import Sequence

SECTIONS = ("model", "data", "lora", "training", SECTION, MONITORS, "margin", "output")
OnNonFinite = Literal["raise", "skip"]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        document: what it was read from, to say where in it something is wrong.
        model: see :class:`ModelSection`.
        data: see :class:`DataSection`.
        lora: arguments of PEFT's LoraConfig.
        training: arguments of TRL's SFTConfig, `completion_only_loss` among them.
        defenses: in the order of the file.
        monitors: in the order of the file.
        on_nonfinite: what to do when a defence is NaN or infinite.
        output: see :class:`OutputSection`.
        margin: see :class:`MarginSection`; None where the recipe has none.
    """

    document: Document
    model: ModelSection
    data: DataSection
    lora: dict[str, Any]
    training: dict[str, Any]
    defenses: tuple[DefenseSpec, ...]
    monitors: tuple[MonitorSpec, ...]
    on_nonfinite: OnNonFinite
    output: OutputSection
    margin: MarginSection | None = None

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults included, as plain values."""
        return {
            "model": dataclasses.asdict(self.model),
            "data": dataclasses.asdict(self.data),
            "lora": dict(self.lora),
            "training": dict(self.training),
            SECTION: {
                **{spec.name: dict(spec.settings) for spec in self.defenses},
                ON_NONFINITE: self.on_nonfinite,
            },
            **({MONITORS: {spec.name: dict(spec.settings) for spec in self.monitors}} if self.monitors else {}),
            **({} if self.margin is None else {"margin": dataclasses.asdict(self.margin)}),
            "output": dataclasses.asdict(self.output),
        }


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; neither torch nor transformers is imported.

    Args:
        path: the YAML file.
        overrides: settings put on top, "section.key=value" with YAML values.

    Raises:
        SettingsError: with the file, the line and the dotted key.
        MissingDependencyError: a package that training needs is missing.
    """
    return recipe_of(read_document(path, overrides))


def recipe_of(document: Document) -> Recipe:
    """The recipe that a document holds.

    Raises:
        SettingsError, MissingDependencyError: as :func:`load_recipe`.
    """
    for name in document.values:
        if name not in SECTIONS:
            raise document.unknown((name,), SECTIONS)
    check_packages()
    recipe = Recipe(
        document=document,
        model=read_section(document, ("model",), ModelSection),
        data=read_section(document, ("data",), DataSection),
        lora=LORA.read(document),
        training=TRAINING.read(document),
        on_nonfinite=_on_nonfinite(document),
        output=read_section(document, ("output",), OutputSection),
        defenses=read_defenses(document),
        monitors=read_monitors(document),
        margin=read_section(document, ("margin",), MarginSection) if "margin" in document.values else None,
    )
    _check(recipe)
    return recipe


def _on_nonfinite(document: Document) -> OnNonFinite:
    value = document.section(SECTION).get(ON_NONFINITE, "raise")
    if not conforms(value, OnNonFinite):
        raise document.problem((SECTION, ON_NONFINITE), f"must be {describe(OnNonFinite)}, not {value!r}")
    chosen: OnNonFinite = value
    return chosen


def _check(recipe: Recipe) -> None:
    """Refuse settings that are out of range or contradict each other."""
    document, data, training = recipe.document, recipe.data, recipe.training
    _check_template(recipe)
    if data.max_rows is not None and data.max_rows < 1:
        raise document.problem(("data", "max_rows"), f"is {data.max_rows}, it must be at least 1")
    if isinstance(data.eval, int | float) and not 0 < data.eval < 1:
        raise document.problem(("data", "eval"), f"is {data.eval}: a share lies above 0 and below 1")
    _check_data(recipe)
    if recipe.margin is not None and recipe.margin.every < 1:
        raise document.problem(("margin", "every"), f"is {recipe.margin.every}, it must be at least 1")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"):
        value = training.get(name)
        if value is not None and value < 1:
            raise document.problem(("training", name), f"is {value}, it must be at least 1")
    if training["num_train_epochs"] <= 0:
        raise document.problem(
            ("training", "num_train_epochs"), f"is {training['num_train_epochs']}, it must be above 0"
        )
    if training.get("max_steps") == 0:
        raise document.problem(("training", "max_steps"), "is 0: nothing would be trained; -1 leaves it to the epochs")
    evaluates = training.get("eval_strategy", "no") not in {"no", False} or training.get("eval_on_start")
    if evaluates and data.eval is None:
        key = "eval_on_start" if training.get("eval_on_start") else "eval_strategy"
        raise document.problem(("training", key), "there is nothing to evaluate on; say data.eval")
    for name in ("learning_rate", "weight_decay", "warmup_steps", "seed"):
        value = training.get(name)
        if isinstance(value, int | float) and value < 0:
            raise document.problem(("training", name), f"is {value}, it must not be negative")
    if training.get("packing") and training.get("max_length") is None:
        raise document.problem(("training", "packing"), "needs training.max_length, the length of a packed row")
    if training.get("bf16") and training.get("fp16"):
        raise document.problem(("training", "fp16"), "bf16 is on too; choose one")


def _check_template(recipe: Recipe) -> None:
    template = recipe.model.chat_template
    if template is not None and not Path(template).expanduser().is_file():
        hint = did_you_mean(Path(template).expanduser())
        raise recipe.document.problem(("model", "chat_template"), f"{template}: there is no such file{hint}")


def _check_data(recipe: Recipe) -> None:
    document, data = recipe.document, recipe.data
    if data.inoculate is not None and data.strings == "text":
        raise document.problem(("data", "inoculate"), "a system prompt needs turns, and data.strings is text; say chat")
    safe = data.safe
    if safe is None:
        for spec in recipe.defenses:
            if spec.settings.get("tokens") == "safe" and spec.settings.get("weight"):
                raise document.problem(
                    (SECTION, spec.name, "tokens"), "is safe, and there are no safe rows; say data.safe"
                )
        return
    if not (math.isfinite(safe.fraction) and safe.fraction > 0):
        raise document.problem(("data", "safe", "fraction"), f"is {safe.fraction}, it must be above 0")
    if safe.top is not None and safe.top < 1:
        raise document.problem(("data", "safe", "top"), f"is {safe.top}, it must be at least 1")
    if safe.seed is not None and safe.seed < 0:
        raise document.problem(("data", "safe", "seed"), f"is {safe.seed}, it must not be negative")
