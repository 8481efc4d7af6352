"""The plan of a run: everything that can be known before weights are loaded, and estimates of what it will cost."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safelora_fast.defenses.step_cost import Shape, Work
from safelora_fast.files.output import resolved
from safelora_fast.recipe.cost import Cost, estimate
from safelora_fast.recipe.mixture import held_out_warnings

if TYPE_CHECKING:
    from peft import PeftModel
    from trl import SFTConfig

    from safelora_fast.data.tokens import ExampleSet
    from safelora_fast.recipe.defense_section import DefenseSpec
    from safelora_fast.recipe.recipe import Recipe


@dataclass(frozen=True)
class DataFacts:
    """Counts of one data set; nothing in it is estimated.

    Attributes:
        in_source: rows in the source.
        rows: those that the recipe takes (`max_rows`, the held-out share).
        used: those that are left after rows without an answer and rows that are too long.
        tokens: of the rows used; the figures after it too.
    """

    source: str
    sha256: str
    in_source: int
    rows: int
    used: int
    without_answer: int
    skipped_too_long: int
    truncated: int
    unused_columns: list[str]
    tokens: int
    answer_tokens: int
    shortest: int
    median: int
    percentile_95: int
    longest: int

    @classmethod
    def of(cls, examples: ExampleSet) -> DataFacts:
        """The facts of a data set."""
        lengths = examples.lengths
        median, high = (int(np.percentile(lengths, q, method="nearest")) for q in (50, 95))
        return cls(
            source=examples.source.source,
            sha256=examples.source.sha256,
            in_source=examples.source.total,
            rows=len(examples.source.rows),
            used=len(lengths),
            without_answer=len(examples.without_answer),
            skipped_too_long=len(examples.skipped_too_long),
            truncated=len(examples.truncated),
            unused_columns=examples.source.unused,
            tokens=sum(lengths),
            answer_tokens=int(examples.examples.answer_lengths.sum()),
            shortest=min(lengths),
            median=median,
            percentile_95=high,
            longest=max(lengths),
        )


@dataclass(frozen=True)
class Facts:
    """What is known of each data set: the task's rows, the rows evaluated on, and the safe ones."""

    task: DataFacts
    held_out: DataFacts | None
    safe: DataFacts | None

    @classmethod
    def of(cls, task: ExampleSet, held_out: ExampleSet | None, safe: ExampleSet | None) -> Facts:
        """The facts of the data sets that there are."""
        others = (None if examples is None else DataFacts.of(examples) for examples in (held_out, safe))
        return cls(DataFacts.of(task), *others)


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        architecture: class of the model.
        shape: its sizes.
        data: the task's rows.
        held_out: the rows evaluated on.
        safe: the safe rows that there are.
        safe_rows: safe rows in the mixture, repetitions included.
        sample: the learnt tokens of the first row, as text.
        processes: data-parallel processes.
        steps: optimiser steps; an estimate when rows are packed.
        rows_per_step: on all processes.
        specs: the defences.
        cost: see :class:`Cost`.
        adapter_bytes: of the adapter file.
        disk_bytes: adapter and checkpoints at the peak.
        free_bytes: free where the output goes.
        warnings: what a careful reader of the recipe would say.
    """

    architecture: str
    shape: Shape
    data: DataFacts
    held_out: DataFacts | None
    safe: DataFacts | None
    safe_rows: int
    sample: str
    processes: int
    steps: int
    rows_per_step: int
    specs: tuple[DefenseSpec, ...]
    cost: Cost
    adapter_bytes: int
    disk_bytes: int
    free_bytes: int
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is estimated lies under "estimates"."""
        return {
            "model": {
                "architecture": self.architecture,
                "parameters": self.shape.parameters,
                "trainable": self.shape.adapter,
                "adapted_modules": len(self.shape.adapted),
            },
            "data": dict(vars(self.data)),
            "held_out": None if self.held_out is None else dict(vars(self.held_out)),
            "safe": None if self.safe is None else {**vars(self.safe), "in_mixture": self.safe_rows},
            "processes": self.processes,
            "warnings": list(self.warnings),
            "steps": self.steps,
            "rows_per_step": self.rows_per_step,
            "estimates": {
                "step_flops": self.cost.step,
                "reference_flops": self.cost.reference,
                "defended_step_flops": self.cost.defended,
                "relative_step": self.cost.defended / self.cost.step,
                "defenses": {name: dict(vars(extra)) for name, extra in self.cost.extras.items()},
                "memory_bytes": self.cost.memory,
                "adapter_bytes": self.adapter_bytes,
                "disk_bytes": self.disk_bytes,
            },
        }


def make_plan(
    recipe: Recipe, arguments: SFTConfig, model: PeftModel, train: ExampleSet, facts: Facts, sample: str
) -> Plan:
    """The plan of a run from its checked parts; `model` may be on the meta device."""
    shape, work = measure(model), workload(arguments, train)
    count = packed_rows(arguments, train)
    processes = process_count()
    steps = optimizer_steps(arguments, count, processes)
    adapter = 4 * shape.adapter
    checkpoint = adapter + shape.adapter * work.optimizer_bytes
    return Plan(
        architecture=type(model.get_base_model()).__name__,
        shape=shape,
        data=facts.task,
        held_out=facts.held_out,
        safe=facts.safe,
        safe_rows=int(train.examples.safe.sum()),
        sample=sample,
        processes=processes,
        steps=steps,
        rows_per_step=rows_per_step(arguments, count, processes),
        specs=recipe.defenses,
        cost=estimate(shape, work, recipe.defenses),
        adapter_bytes=adapter,
        disk_bytes=adapter + checkpoint * kept_checkpoints(arguments, steps),
        free_bytes=free_space(Path(recipe.output.folder)),
        warnings=held_out_warnings(recipe, facts.task.sha256),
    )


def workload(arguments: SFTConfig, train: ExampleSet) -> Work:
    """What an optimiser step works through."""
    lengths = train.lengths
    count, processes = packed_rows(arguments, train), process_count()
    rows = rows_per_step(arguments, count, processes)
    share = rows / count
    batch = arguments.per_device_train_batch_size
    tokens, answers = sum(lengths), int(train.examples.answer_lengths.sum())
    return Work(
        tokens=tokens * share,
        squares=sum(length * length for length in lengths) * share,
        answers=answers * share,
        safe=int(train.examples.lengths[train.examples.safe].sum()) * share,
        head_tokens=(answers if _head_takes_answers_only() else tokens) * share,
        micro_batches=math.ceil(rows / batch),
        micro_tokens=batch * (arguments.max_length if arguments.packing else max(lengths)),
        checkpointing=bool(arguments.gradient_checkpointing),
        optimizer_bytes=optimizer_bytes(str(arguments.optim)),
    )


def process_count() -> int:
    """Data-parallel processes, as torchrun and accelerate say."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def packed_rows(arguments: SFTConfig, train: ExampleSet) -> int:
    """Rows that the trainer sees: the examples, or at least so many packed rows."""
    if arguments.packing:
        return math.ceil(sum(train.lengths) / int(arguments.max_length))
    return len(train.examples)


def rows_per_step(arguments: SFTConfig, rows: int, processes: int) -> int:
    """Rows of an optimiser step on all processes."""
    return min(int(arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps) * processes, rows)


def optimizer_steps(arguments: SFTConfig, rows: int, processes: int) -> int:
    """Optimiser steps, as the trainer counts them."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batch = arguments.per_device_train_batch_size * processes
    batches = rows // batch if arguments.dataloader_drop_last else math.ceil(rows / batch)
    updates: int = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    return math.ceil(float(arguments.num_train_epochs) * updates)


def kept_checkpoints(arguments: SFTConfig, steps: int) -> int:
    """The most checkpoints that lie on the disk at once."""
    strategy = getattr(arguments.save_strategy, "value", arguments.save_strategy)
    if strategy == "no":
        return 0
    made = math.ceil(float(arguments.num_train_epochs))
    if strategy == "steps":
        every = arguments.save_steps if arguments.save_steps >= 1 else max(steps * arguments.save_steps, 1)
        made = math.ceil(steps / every)
    limit: int | None = arguments.save_total_limit
    return made if not limit else min(made, limit + 1)


def optimizer_bytes(name: str) -> int:
    """Bytes of state that an optimiser keeps a parameter: two moments, where nothing else is known of it."""
    name = name.rsplit(".", 1)[-1].lower()
    moments = 1 if "lion" in name else 0 if name in {"sgd", "adafactor"} or "lomo" in name else 2
    return moments * (1 if "8bit" in name or "4bit" in name else 4)


def measure(model: PeftModel) -> Shape:
    """The sizes of an adapted model."""
    from safelora_fast.models.anatomy import dissect
    from safelora_fast.recipe.adapted_model import adapted_names

    anatomy = dissect(model)
    config = anatomy.config
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    frozen = [parameter for parameter in anatomy.model.parameters() if id(parameter) not in trained]
    head = anatomy.model.get_output_embeddings()
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        parameters=sum(parameter.numel() for parameter in frozen),
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in frozen),
        matrices=_matrices(anatomy.blocks, trained, config),
        head=0 if head is None else sum(parameter.numel() for parameter in head.parameters()),
        adapter=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        adapted=tuple(
            (layer.lora_B["default"].weight.shape[0], layer.lora_A["default"].weight.shape[1], layer.r["default"])
            for _, layer in adapted_names(model)
            if "default" in layer.lora_A
        ),
        layers=anatomy.depth,
        hidden=config.hidden_size,
        attention=heads * width,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        value_bytes=max(frozen, key=lambda parameter: parameter.numel()).element_size(),
    )


def _matrices(blocks: Any, trained: set[int], config: Any) -> int:
    """Weights that a token is multiplied by; a stack of experts counts with the share that a token uses."""
    used, experts = (getattr(config, name, None) for name in ("num_experts_per_tok", "num_experts"))
    experts = experts or getattr(config, "num_local_experts", None) or getattr(config, "n_routed_experts", None)
    share = used / experts if used and experts else 1.0
    parameters = [parameter for block in blocks for parameter in block.parameters() if id(parameter) not in trained]
    flat: int = sum(parameter.numel() for parameter in parameters if parameter.dim() == 2)
    stacked: int = sum(parameter.numel() for parameter in parameters if parameter.dim() == 3)
    return flat + int(share * stacked)


def free_space(folder: Path) -> int:
    """Free bytes where a folder is or will be."""
    there = next(path for path in (resolved(folder), *resolved(folder).parents) if path.exists())
    return shutil.disk_usage(there).free


def _head_takes_answers_only() -> bool:
    """Newer versions of TRL take only labelled tokens through the output head."""
    import trl.trainer

    return hasattr(trl.trainer, "add_fused_lm_head")
