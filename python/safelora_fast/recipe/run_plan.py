"""The plan of a run: everything that is known before loading weights, and estimates of the run's cost.

The estimates count matrix products and attention, at two operations per multiply-add. They ignore norms, activations,
the optimizer and padding. Frozen weights have no gradient, so the backward pass costs one product per weight; full
fine-tuning costs two.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safelora_fast.configuration.defense_section import BASE
from safelora_fast.defenses.base import BatchDefense
from safelora_fast.defenses.step_cost import CHUNK_BYTES, Shape, Work
from safelora_fast.files.output import resolved
from safelora_fast.recipe.mixture import held_out_warnings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel
    from trl import SFTConfig

    from safelora_fast.configuration.defense_section import DefenseSpec
    from safelora_fast.data.tokens import ExampleSet
    from safelora_fast.defenses.step_cost import Extra
    from safelora_fast.recipe.recipe import Recipe


@dataclass(frozen=True)
class DataFacts:
    """Exact counts for one data set. Token counts and lengths cover only the used examples.

    Attributes:
        in_source: examples in the source.
        rows: examples selected by the recipe (`max_rows`, the held-out share).
        used: selected examples that have a completion and are not too long.
        truncated: used examples that were truncated.
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
        """Count a data set."""
        source, lengths = examples.source, examples.lengths
        shortest, median, high, longest = (int(np.percentile(lengths, q, method="nearest")) for q in (0, 50, 95, 100))
        return cls(
            source=source.source,
            sha256=source.sha256,
            in_source=source.total,
            rows=len(source.rows),
            used=len(lengths),
            without_answer=len(examples.without_answer),
            skipped_too_long=len(examples.skipped_too_long),
            truncated=len(examples.truncated),
            unused_columns=source.unused,
            tokens=sum(lengths),
            answer_tokens=int(examples.examples.answer_lengths.sum()),
            shortest=shortest,
            median=median,
            percentile_95=high,
            longest=longest,
        )


@dataclass(frozen=True)
class Cost:
    """Estimates for one optimizer step.

    Attributes:
        step: operations without defenses.
        reference: operations of the reference passes.
        extras: the extra cost of each defense.
        memory: bytes by use.
    """

    step: float
    reference: float
    extras: dict[str, Extra]
    memory: dict[str, float] = field(default_factory=dict)

    @property
    def defended(self) -> float:
        """Operations of a step with defenses."""
        return self.step + self.reference + sum(extra.flops for extra in self.extras.values())


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        safe_rows: safe examples in the mixture, including repetitions; `safe` counts distinct ones.
        sample: the learned tokens of the first example, as text.
        steps: optimizer steps; an estimate if examples are packed.
        rows_per_step: examples per optimizer step over all processes.
        disk_bytes: peak disk use of the adapter and its checkpoints.
        cache_bytes: upper bound on the size of the cache of the reference's hidden states; 0 without one.
        rows_last: whether an epoch has the rows of the one before. If not, a cache keeps those of every epoch.
        warnings: likely mistakes in the recipe.
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
    cost: Cost
    adapter_bytes: int
    disk_bytes: int
    free_bytes: int
    cache_bytes: int = 0
    rows_last: bool = True
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; all estimates are under the key "estimates"."""
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
                "cache_bytes": self.cache_bytes,
            },
        }


def make_plan(
    recipe: Recipe,
    arguments: SFTConfig,
    model: PeftModel,
    *,
    train: ExampleSet,
    task: ExampleSet,
    held_out: ExampleSet | None,
    safe: ExampleSet | None,
    sample: str,
    rows_last: bool = True,
) -> Plan:
    """Build the plan of a run from its checked parts; `model` may be on the meta device."""
    shape, work = measure(model), workload(arguments, train)
    count, processes = packed_rows(arguments, train), process_count()
    steps = optimizer_steps(arguments, count, processes)
    adapter = 4 * shape.adapter
    facts = DataFacts.of(task)
    return Plan(
        architecture=type(model.get_base_model()).__name__,
        shape=shape,
        data=facts,
        held_out=None if held_out is None else DataFacts.of(held_out),
        safe=None if safe is None else DataFacts.of(safe),
        safe_rows=int(train.examples.safe.sum()),
        sample=sample,
        processes=processes,
        steps=steps,
        rows_per_step=rows_per_step(arguments, count, processes),
        cost=estimate(shape, work, recipe.defenses),
        adapter_bytes=adapter,
        disk_bytes=adapter + (adapter + shape.adapter * work.optimizer_bytes) * kept_checkpoints(arguments, steps),
        free_bytes=free_space(Path(recipe.output.folder)),
        cache_bytes=cache_bytes(recipe, model, shape, sum(train.lengths) * (1 if rows_last else max(work.epochs, 1))),
        rows_last=rows_last,
        warnings=held_out_warnings(recipe, facts.sha256),
    )


def estimate(shape: Shape, work: Work, specs: Sequence[DefenseSpec]) -> Cost:
    """Estimate the cost of one optimizer step with these defenses."""
    active = [spec for spec in specs if spec.outline.active]
    attention = 2 * shape.layers * shape.attention * work.squares
    layers = 2 * (shape.matrices + shape.adapter) * work.tokens + attention
    head = 2 * shape.head * work.head_tokens
    reached = (
        1.0 if work.checkpointing else shape.reached
    )  # with checkpointing, trainers give the embeddings a gradient
    backward = reached * (2 * shape.matrices * work.tokens + 2 * attention) + head
    backward += 4 * shape.adapter * work.tokens
    step = layers + head + backward + (layers if work.checkpointing else 0)
    # The largest share contains the others: defenses draw the same examples.
    share = max((spec.outline.reference_share(work) for spec in active), default=0.0)
    reference = share * (2 * shape.matrices * work.tokens + attention)
    extras = {spec.name: spec.outline.cost(shape, work) for spec in active}
    return Cost(step, reference, extras, _memory(shape, work, extras))


def cache_bytes(recipe: Recipe, model: PeftModel, shape: Shape, tokens: float) -> int:
    """Return the size of a cache with the reference's hidden states of some tokens; 0 if the recipe has none."""
    from safelora_fast.models.anatomy import dissect

    outlines = [spec.outline for spec in recipe.defenses if spec.outline.active]
    compared = [one for one in outlines if isinstance(one, BatchDefense) and one.needs_reference]
    compared = [one for one in compared if not one.keeps_reference]
    if recipe.reference == BASE or not compared:
        return 0
    layers = {index for one in compared for index in one.recorded_layers(dissect(model))}
    return (1 + len(layers)) * math.ceil(tokens) * shape.hidden * shape.value_bytes


def _memory(shape: Shape, work: Work, extras: dict[str, Extra]) -> dict[str, float]:
    per_token = 10 * shape.hidden + 4 * shape.attention + 4 * shape.inner
    layer = work.micro_tokens * per_token * shape.value_bytes
    inputs = shape.layers * work.micro_tokens * shape.hidden * shape.value_bytes
    return {
        "weights": shape.weight_bytes,
        "adapter, its gradient and optimizer": shape.adapter * (8 + work.optimizer_bytes),
        "activations": inputs + layer if work.checkpointing else shape.layers * layer,
        "logits": min(CHUNK_BYTES, 10 * work.micro_tokens * shape.head // max(shape.hidden, 1)),
        "defenses": sum(extra.memory for extra in extras.values()),
    }


def workload(arguments: SFTConfig, train: ExampleSet) -> Work:
    """Return the average workload of one optimizer step."""
    import trl.trainer

    lengths = train.lengths
    count = packed_rows(arguments, train)
    rows = rows_per_step(arguments, count, process_count())
    share = rows / count
    batch = arguments.per_device_train_batch_size
    tokens, answers = sum(lengths), int(train.examples.answer_lengths.sum())
    head_takes_answers_only = hasattr(trl.trainer, "add_fused_lm_head")  # in newer versions of TRL
    return Work(
        tokens=tokens * share,
        squares=sum(length * length for length in lengths) * share,
        answers=answers * share,
        safe=int(train.examples.lengths[train.examples.safe].sum()) * share,
        head_tokens=(answers if head_takes_answers_only else tokens) * share,
        micro_batches=math.ceil(rows / batch),
        micro_tokens=batch * (arguments.max_length if arguments.packing else max(lengths)),
        checkpointing=bool(arguments.gradient_checkpointing),
        optimizer_bytes=optimizer_bytes(str(arguments.optim)),
        epochs=optimizer_steps(arguments, count, process_count()) * share,
    )


def process_count() -> int:
    """Return the number of data-parallel processes, as set by torchrun and accelerate."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def packed_rows(arguments: SFTConfig, train: ExampleSet) -> int:
    """Return the number of rows in the trainer's data set: the examples, or a lower bound on the packed rows."""
    return math.ceil(sum(train.lengths) / int(arguments.max_length)) if arguments.packing else len(train.examples)


def rows_per_step(arguments: SFTConfig, rows: int, processes: int) -> int:
    """Return the number of rows in one optimizer step over all processes."""
    return min(int(arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps) * processes, rows)


def optimizer_steps(arguments: SFTConfig, rows: int, processes: int) -> int:
    """Return the number of optimizer steps as the trainer counts them."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batch = arguments.per_device_train_batch_size * processes
    batches = rows // batch if arguments.dataloader_drop_last else math.ceil(rows / batch)
    updates: int = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    return math.ceil(float(arguments.num_train_epochs) * updates)


def kept_checkpoints(arguments: SFTConfig, steps: int) -> int:
    """Return the largest number of checkpoints on disk at one time."""
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
    """Return the bytes of optimizer state per parameter; an unknown optimizer counts with two moments."""
    name = name.rsplit(".", 1)[-1].lower()
    moments = 1 if "lion" in name else 0 if name in {"sgd", "adafactor"} or "lomo" in name else 2
    return moments * (1 if "8bit" in name or "4bit" in name else 4)


def measure(model: PeftModel) -> Shape:
    """Return the sizes of an adapted model."""
    from safelora_fast.models.anatomy import dissect

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
        matrices=_matrices(anatomy.layers, trained, config),
        head=0 if head is None else sum(parameter.numel() for parameter in head.parameters()),
        adapter=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        adapted=tuple(
            (layer.lora_B["default"].weight.shape[0], layer.lora_A["default"].weight.shape[1], layer.r["default"])
            for layer in anatomy.model.modules()
            if hasattr(layer, "base_layer") and "default" in getattr(layer, "lora_A", ())
        ),
        layers=anatomy.depth,
        hidden=config.hidden_size,
        attention=heads * width,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        value_bytes=max(frozen, key=lambda parameter: parameter.numel()).element_size(),
        reached=_reached(model, anatomy.layers),
    )


def _reached(model: PeftModel, layers: Sequence[Any]) -> float:
    """Return the share of the layers that backward passes through; all of them if an embedding is trained."""
    trained = [any(one.requires_grad for one in layer.parameters()) for layer in layers]
    inside = {id(one) for layer in layers for one in layer.parameters() if one.requires_grad}
    below = any(one.requires_grad and id(one) not in inside for one in model.parameters())
    return 1.0 if below or not any(trained) else 1 - trained.index(True) / len(trained)


def _matrices(layers: Any, trained: set[int], config: Any) -> int:
    """Return the number of weights used per token; stacked experts count with the share that one token uses."""
    used, experts = (getattr(config, name, None) for name in ("num_experts_per_tok", "num_experts"))
    experts = experts or getattr(config, "num_local_experts", None) or getattr(config, "n_routed_experts", None)
    share = used / experts if used and experts else 1.0
    parameters = [parameter for layer in layers for parameter in layer.parameters() if id(parameter) not in trained]
    flat: int = sum(parameter.numel() for parameter in parameters if parameter.dim() == 2)
    stacked: int = sum(parameter.numel() for parameter in parameters if parameter.dim() == 3)
    return flat + int(share * stacked)


def free_space(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    there = next(path for path in (resolved(folder), *resolved(folder).parents) if path.exists())
    return shutil.disk_usage(there).free
