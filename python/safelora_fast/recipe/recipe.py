"""A recipe: one checked YAML file with the model, data, adapter, trainer, defenses and output of a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import did_you_mean
from safelora_fast.configuration.defense_section import (
    BASE,
    MONITORS,
    ON_NONFINITE,
    REFERENCE,
    SECTION,
    DefenseSpec,
    MonitorSpec,
    OnNonFinite,
    read_defenses,
    read_monitors,
    read_on_nonfinite,
    read_reference,
)
from safelora_fast.configuration.yaml_document import Document, read_document
from safelora_fast.configuration.yaml_section import read_section
from safelora_fast.models.model_settings import ModelSection
from safelora_fast.recipe.lora_and_trainer_sections import LORA, TRAINING
from safelora_fast.recipe.sections import DataSection, MarginSection, OutputSection

if TYPE_CHECKING:
    from collections.abc import Sequence

SECTIONS = ("model", "data", "lora", "training", SECTION, MONITORS, "margin", "output")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        document: the file, for error messages with line numbers.
        lora: arguments of PEFT's LoraConfig.
        training: arguments of TRL's SFTConfig, including `completion_only_loss`.
        defenses: the defenses in file order.
        monitors: the monitors in file order.
        on_nonfinite: what to do when a defense's term is NaN or infinite.
        reference: "base", or "cache:FOLDER" to keep its hidden states on disk (see :func:`~safelora_fast.training.defend`).
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
    reference: str = BASE

    def resolved(self) -> dict[str, Any]:
        """Return all settings, including defaults, as plain values."""
        return {
            "model": dataclasses.asdict(self.model),
            "data": self.data.model_dump(),
            "lora": dict(self.lora),
            "training": dict(self.training),
            SECTION: {
                **{spec.name: dict(spec.settings) for spec in self.defenses},
                ON_NONFINITE: self.on_nonfinite,
                **({} if self.reference == BASE else {REFERENCE: self.reference}),
            },
            **({MONITORS: {spec.name: dict(spec.settings) for spec in self.monitors}} if self.monitors else {}),
            **({} if self.margin is None else {"margin": self.margin.model_dump()}),
            "output": self.output.model_dump(),
        }


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe without importing torch or transformers.

    Args:
        path: the YAML file.
        overrides: settings that replace those of the file, as "section.key=value" with YAML values.

    Raises:
        SettingsError: with the file, the line and the dotted key.
    """
    return recipe_of(read_document(path, overrides))


def recipe_of(document: Document) -> Recipe:
    """Build and check the recipe from a parsed document.

    Raises:
        SettingsError: see :func:`load_recipe`.
    """
    for name in document.values:
        if name not in SECTIONS:
            raise document.unknown((name,), SECTIONS)
    recipe = Recipe(
        document=document,
        model=read_section(document, ("model",), ModelSection),
        data=read_section(document, ("data",), DataSection),
        lora=LORA.read(document),
        training=TRAINING.read(document),
        on_nonfinite=read_on_nonfinite(document),
        output=read_section(document, ("output",), OutputSection),
        defenses=read_defenses(document),
        monitors=read_monitors(document),
        reference=read_reference(document),
        margin=read_section(document, ("margin",), MarginSection) if "margin" in document.values else None,
    )
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    """Raise SettingsError for settings that contradict each other and for missing files."""
    document, data, training, template = recipe.document, recipe.data, recipe.training, recipe.model.chat_template
    if template is not None and not Path(template).expanduser().is_file():
        hint = did_you_mean(Path(template).expanduser())
        raise document.problem(("model", "chat_template"), f"{template}: there is no such file{hint}")
    if data.inoculate is not None and data.strings == "text":
        raise document.problem(("data", "inoculate"), "a system prompt needs turns, and data.strings is text; say chat")
    for spec in recipe.defenses if data.safe is None else ():
        if spec.settings.get("tokens") == "safe" and spec.settings.get("weight"):
            where = (SECTION, spec.name, "tokens")
            raise document.problem(where, "is safe, and there are no safe rows; say data.safe")
    if training.get("max_steps") == 0:
        raise document.problem(("training", "max_steps"), "is 0: nothing would be trained; -1 leaves it to the epochs")
    evaluates = {
        "eval_on_start": bool(training.get("eval_on_start")),
        "eval_strategy": training.get("eval_strategy", "no") not in ("no", False),
    }
    for key in (key for key, wanted in evaluates.items() if wanted and data.eval is None):
        raise document.problem(("training", key), "there is nothing to evaluate on; say data.eval")
    if training.get("packing") and training.get("max_length") is None:
        raise document.problem(("training", "packing"), "needs training.max_length, the length of a packed row")
    if training.get("bf16") and training.get("fp16"):
        raise document.problem(("training", "fp16"), "bf16 is on too; choose one")
