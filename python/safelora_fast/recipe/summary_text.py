"""Plans and settings formatted as text for the terminal and the model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.configuration.defense_section import CACHE
from safelora_fast.recipe.run_plan import free_space

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safelora_fast.configuration.defense_section import DefenseSpec, MonitorSpec
    from safelora_fast.defenses.step_cost import Extra
    from safelora_fast.recipe.prepare import Prepared
    from safelora_fast.recipe.run_plan import DataFacts, Plan

SAMPLE_WIDTH = 60


def plan_lines(prepared: Prepared) -> list[tuple[str, str]]:
    """Return the (label, text) lines of a plan. Continuation lines have an empty label; ≈ marks an estimate."""
    return [
        *_model(prepared),
        *_data(prepared),
        *_training(prepared),
        *_defenses(prepared),
        *_costs(prepared.plan),
        *(("warning", warning) for warning in prepared.plan.warnings),
    ]


def _model(prepared: Prepared) -> Iterator[tuple[str, str]]:
    plan, recipe = prepared.plan, prepared.recipe
    shape = plan.shape
    yield "model", f"{recipe.model.path}: {plan.architecture}, {recipe.model.dtype}, on {prepared.arguments.device}"
    share = 100 * shape.adapter / (shape.parameters + shape.adapter)
    yield (
        "",
        f"{shape.parameters:,} frozen parameters; LoRA on {len(shape.adapted)} modules trains {shape.adapter:,} ({share:.3g} %)",
    )


def _data(prepared: Prepared) -> Iterator[tuple[str, str]]:
    plan = prepared.plan
    yield from _data_set("data", plan.data)
    yield "", f"the first row learns “{_short(plan.sample)}”"
    if prepared.recipe.data.inoculate is not None:
        yield "", f"in training under the system prompt “{_short(prepared.recipe.data.inoculate)}”"
    if plan.safe is not None:
        yield from _data_set("safe", plan.safe)
        share = f"{plan.safe_rows:,} for {plan.data.used:,} task rows"
        yield "", f"in the mixture {share}, each up to {-(-plan.safe_rows // plan.safe.used)} ×"
    if plan.held_out is not None:
        yield from _data_set("held out", plan.held_out)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SAMPLE_WIDTH else text[: SAMPLE_WIDTH - 1] + "…"


def _data_set(label: str, facts: DataFacts) -> Iterator[tuple[str, str]]:
    count = f"{facts.rows:,} rows" if facts.rows == facts.in_source else f"{facts.rows:,} of {facts.in_source:,} rows"
    yield label, f"{facts.source}: {count}, sha256 {facts.sha256[:12]}…"
    lengths = f"{facts.median:,} median, {facts.percentile_95:,} 95th percentile, {facts.longest:,} longest"
    yield "", f"tokens a row: {lengths}; {facts.tokens:,} in all, {facts.answer_tokens:,} of them learned"
    left_out = [
        (facts.without_answer, "left out: no answer token"),
        (facts.skipped_too_long, "left out: too long"),
        (facts.truncated, "cut at max_length"),
    ]
    changes = [f"{count:,} {what}" for count, what in left_out if count]
    if changes:
        yield "", "; ".join(changes)
    if facts.unused_columns:
        yield "", f"columns not used: {', '.join(facts.unused_columns)}"


def _training(prepared: Prepared) -> Iterator[tuple[str, str]]:
    arguments, plan = prepared.arguments, prepared.plan
    accumulated = f"{arguments.per_device_train_batch_size} × {arguments.gradient_accumulation_steps}"
    processes = f" × {plan.processes} processes" if plan.processes > 1 else ""
    about = "≈ " if arguments.packing else ""
    what = "packed rows" if arguments.packing else "rows"
    yield "training", f"{about}{plan.steps:,} steps of {plan.rows_per_step} {what} ({accumulated}{processes})"
    optimizer, schedule = (getattr(value, "value", value) for value in (arguments.optim, arguments.lr_scheduler_type))
    rate = f"{schedule} schedule from {arguments.learning_rate:g}"
    yield "", f"{optimizer}, {rate}, weight decay {arguments.weight_decay:g}, seed {arguments.seed}"


def _defenses(prepared: Prepared) -> Iterator[tuple[str, str]]:
    specs, cost = prepared.recipe.defenses, prepared.plan.cost
    if not specs:
        yield "defenses", "none"
    for number, spec in enumerate(specs):
        yield "defenses" if number == 0 else "", f"{spec.name}: {settings_words(spec)}"
        off = "switched off: costs nothing, changes nothing"
        yield "", f"  {_extra(cost.extras[spec.name], cost.step) if spec.outline.active else off}"
    if cost.reference:
        yield "", f"one reference pass a micro-batch serves all: ≈ +{100 * cost.reference / cost.step:.2g} % of a step"
    if prepared.plan.cache_bytes:
        folder = prepared.recipe.reference.removeprefix(CACHE)
        room = f"up to ≈ {size(prepared.plan.cache_bytes)}, {size(free_space(Path(folder).expanduser()))} are free"
        use = "later epochs, and runs on the same rows, read it there"
        if not prepared.plan.rows_last:
            use = "every epoch packs or flattens other rows, so it grows and saves no pass"
        yield "", f"what it gave is kept in {folder} ({room}): {use}"
    for number, monitor in enumerate(prepared.recipe.monitors):
        yield "monitors" if number == 0 else "", f"{monitor.name}: {settings_words(monitor)}; changes nothing"
    margin, pairs = prepared.recipe.margin, prepared.pairs
    if margin is not None and pairs is not None:
        yield "margin", f"measured every {margin.every} steps over {len(pairs)} pairs, at the start and at the end"
        if margin.stop is not None:
            signals = ", ".join(["margin", *(monitor.name for monitor in prepared.recipe.monitors)])
            yield (
                "",
                f"training stops at an alarm of {signals}; false alarms in at most {100 * margin.stop.alpha:g} % of runs",
            )


def _extra(extra: Extra, step: float) -> str:
    """Describe the extra cost of a defense."""
    if not extra.flops and not extra.memory:
        return extra.words
    share = extra.flops / step
    amount = f"≈ +{100 * share:.2g} % of a step" if share >= 0.001 else "less than 0.1 % of a step"
    return f"{extra.words}: {amount}, ≈ {size(extra.memory)} of memory"


def _costs(plan: Plan) -> Iterator[tuple[str, str]]:
    cost = plan.cost
    ratio, total = cost.defended / cost.step, operations(cost.defended * plan.steps)
    yield "step", f"≈ {operations(cost.defended)}, {ratio:.2f} × an undefended step; {total} in all"
    parts = ", ".join(f"{what} {size(number)}" for what, number in cost.memory.items() if number)
    yield "memory", f"≈ {size(sum(cost.memory.values()))}: {parts}"
    adapter, checkpoints = size(plan.adapter_bytes), size(plan.disk_bytes - plan.adapter_bytes)
    yield "disk", f"≈ {adapter} adapter, {checkpoints} checkpoints; {size(plan.free_bytes)} are free"


def settings_words(spec: DefenseSpec | MonitorSpec) -> str:
    """Format the settings of a defense or monitor, in the order of its arguments."""
    return ", ".join(f"{name} {_plain(value)}" for name, value in spec.settings.items() if value is not None)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_plain(item)}" for name, item in value.items() if item is not None) + "}"
    if isinstance(value, list) and len(value) > 8:
        return f"[{len(value)} values]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def size(number: float) -> str:
    """Format a number of bytes with three digits."""
    return _scaled(number, ("B", "kB", "MB", "GB", "TB"))


def operations(number: float) -> str:
    """Format a number of floating-point operations with three digits."""
    return _scaled(number, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} {units[-1]}"
