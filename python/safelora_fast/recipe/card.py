"""The model card of a trained adapter, including its defenses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.model_card import code, escaped, model_card, shown_model, shown_paths, table
from safelora_fast.checkpoints.resolver import name_and_revision
from safelora_fast.recipe.run_metrics import shown
from safelora_fast.recipe.summary_text import settings_words

if TYPE_CHECKING:
    from safelora_fast.configuration.defense_section import DefenseSpec
    from safelora_fast.recipe.prepare import Prepared
    from safelora_fast.recipe.run_plan import DataFacts, Plan


def render(prepared: Prepared, record: dict[str, Any]) -> str:
    """Return the card as Markdown with the front matter for the Hub. The same run always gives the same card."""
    recipe, plan = prepared.recipe, prepared.plan
    name, _ = name_and_revision(recipe.model.path)
    facts = {
        "base model": f"{code(shown_model(recipe.model.path))}{_commit(record)}, {_size(prepared)}",
        "trained on": _data(plan.data),
        **({"safe rows among them": _safe(plan)} if plan.safe else {}),
        **({"system prompt in training": escaped(recipe.data.inoculate)} if recipe.data.inoculate else {}),
        **({"held out": _data(plan.held_out)} if plan.held_out else {}),
    }
    body = [
        _summary(record),
        "",
        "## Defenses",
        "",
        *_defenses(prepared, record),
        "## Base model and data",
        "",
        *table(facts),
        *_settings("LoRA", recipe.lora),
        *_settings("Training", {**recipe.training, "optimizer steps": record["steps"]}),
        "What is not listed is the default of PEFT and TRL; `safelora_train.json` has every argument and version.",
        "",
        *_metrics(record["metrics"]),
    ]
    title = "LoRA adapter, trained with in-training defenses" if record["defenses"] else "LoRA adapter"
    return model_card(title, body, model=name)


def _size(prepared: Prepared) -> str:
    return f"{prepared.plan.shape.parameters:,} parameters, {prepared.recipe.model.dtype}"


def _summary(record: dict[str, Any]) -> str:
    active = [name for name, facts in record["defenses"].items() if facts["active"]]
    if not active:
        return (
            "Trained with `safelora-fast` **without any defense**. Fine-tuning on narrow data can make a model broadly "
            "misaligned; nothing here was done against that."
        )
    return f"Trained with `safelora-fast` and these defenses against emergent misalignment: {', '.join(active)}."


def _defenses(prepared: Prepared, record: dict[str, Any]) -> list[str]:
    if not prepared.recipe.defenses:
        return ["None.", ""]
    lines = ["| defense | what it is | settings | first → last |", "| --- | --- | --- | --- |"]
    for spec in prepared.recipe.defenses:
        what = _first_sentence(spec) if spec.outline.active else "switched off"
        metric = record["metrics"].get(f"defense/{spec.name}")
        change = f"{shown(metric['first'])} → {shown(metric['last'])}" if metric else "–"
        lines.append(f"| `{spec.name}` | {escaped(what)} | {escaped(shown_paths(settings_words(spec)))} | {change} |")
    return [*lines, "", *_projection(record["projection"])]


def _projection(report: dict[str, Any] | None) -> list[str]:
    """Summarize the projection at the end of training; `report` has the format of the project command's report."""
    if report is None:
        return []
    counts = report["adapters"][0]["counts"]
    return [
        f"At the end {counts['projected']} of {counts['modules']} adapted modules were projected; `safelora_train.json` has "
        "the cosine and the gain of each.",
        "",
        *(f"- {shown_paths(warning)}" for warning in report["warnings"]),
        *([""] if report["warnings"] else []),
    ]


def _first_sentence(spec: DefenseSpec) -> str:
    return (spec.kind.__doc__ or spec.name).strip().splitlines()[0]


def _commit(record: dict[str, Any]) -> str:
    return f" at commit `{record['commit']}`" if record.get("commit") else ""


def _data(facts: DataFacts) -> str:
    rows = f"{facts.used:,} rows" if facts.used == facts.in_source else f"{facts.used:,} of {facts.in_source:,} rows"
    learned = f"{facts.tokens:,} tokens, {facts.answer_tokens:,} of them learned"
    return f"{code(shown_paths(facts.source))}, {rows}, {learned}, sha256 `{facts.sha256}`"


def _safe(plan: Plan) -> str:
    assert plan.safe is not None  # noqa: S101
    return f"{plan.safe_rows:,} for {plan.data.used:,} task rows, of {_data(plan.safe)}"


def _settings(title: str, values: dict[str, Any]) -> list[str]:
    return [f"## {title}", "", *table({name: escaped(shown_paths(str(value))) for name, value in values.items()})]


def _metrics(metrics: dict[str, dict[str, float | None]]) -> list[str]:
    rows = [
        f"| {name} | {shown(metric['first'])} | {shown(metric['last'])} | {shown(metric['mean'])} |"
        for name, metric in metrics.items()
        if name != "defense/time_share"
    ]
    heading = [
        "## Metrics",
        "",
        "Of the training log; defenses before their weight. `eval_loss` is the plain loss on held-out rows, `monitor/…` the "
        "projection of mean response activations on a persona vector of unit length.",
        "",
    ]
    return [*heading, "| | first | last | mean |", "| --- | ---: | ---: | ---: |", *rows, ""]
