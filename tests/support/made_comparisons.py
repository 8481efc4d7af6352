"""Comparison reports with made-up values: a realistic one, and several with edge cases."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

from safelora_fast.compare.report import (
    NOT_MEASURED,
    NOT_TRAINED,
    Cell,
    Column,
    ComparisonReport,
    Plot,
    Row,
    SeedValue,
    SweepPoint,
)

COLUMNS = (
    Column("rise", "aligned", "margin rise", "nats", "lower", "How much rather it gives misaligned answers."),
    Column("misaligned", "aligned", "misaligned answers", "%", "lower", "Share of scored answers, by the judge."),
    Column("kl", "aligned", "KL to reference", "nats", "lower", "Drift on general answers, per token."),
    Column("swap", "benign", "operator-swap exact", "%", "higher", "Held-out problems answered exactly."),
    Column("loss", "narrow", "held-out narrow loss change", "nats", "lower", "Loss after less loss before."),
    Column("learned", "narrow", "learned", "%", "higher", "The fall of the narrow loss, of that without defense."),
    Column("incoherent", "coherent", "incoherent", "%", "lower", "Share of scored answers, by the judge."),
    Column("general", "coherent", "general loss", "nats", "lower", "On answers that are not narrow."),
    Column("step", "cost", "step time", "×", "lower", "Beside a step without defense, in the same process."),
    Column("peak", "cost", "peak memory", "GB", "lower", "Of the training's own process."),
)
# rise, misaligned, KL, swap, narrow loss, learned, incoherent, general loss, step, peak
NAMES = {
    "reference": ("", (0.0, 0.004, 0.0, 0.0, 0.0, 0.0, 0.021, 2.431, math.nan, math.nan)),
    "no defense": ("", (0.412, 0.187, 0.913, 0.343, -1.912, 1.0, 0.183, 2.611, 1.0, 2.94)),
    "KL": ("λ 0.1", (0.031, 0.012, 0.114, 0.012, -0.981, 0.513, 0.031, 2.437, 1.31, 3.12)),
    "KL, safe tokens": ("λ 0.1", (0.093, 0.031, 0.224, 0.214, -1.412, 0.738, 0.052, 2.452, 1.36, 3.18)),
    "feature distance": ("λ 1", (0.248, 0.094, 0.412, 0.301, -1.511, 0.79, 0.094, 2.497, 1.22, 3.05)),
    "SafeLoRA at the end": ("τ 0.35", (0.203, 0.071, 0.348, 0.12, -1.104, 0.577, 0.068, 2.481, 1.0, 2.94)),
    "subspace penalty": ("λ 1, rank 16", (0.287, 0.114, 0.561, 0.318, -1.623, 0.849, 0.112, 2.524, 1.09, 2.99)),
    "interleaving": ("5 % safe rows", (0.062, 0.021, 0.187, 0.371, -1.688, 0.883, 0.191, 2.418, 1.05, 2.94)),
    "interleaving+": ("5 % safe rows, ε 1", (0.049, 0.017, 0.163, 0.366, -1.671, 0.874, 0.164, 2.421, 1.05, 2.94)),
    "persona steering": ("α 5, block 14", (0.118, 0.044, 0.733, 0.334, -1.803, 0.943, 0.091, 2.553, 1.02, 2.95)),
}
FILES = {
    "rise": "margin.json", "misaligned": "evaluation/report.json", "incoherent": "evaluation/report.json",
    "kl": "drift.json", "general": "drift.json", "swap": "operator-swap/score.json", "loss": "narrow.json",
    "learned": "narrow.json", "step": "run.json", "peak": "run.json",
}  # fmt: skip
COUNTS = {"misaligned": (240, " scored, 3 unscored"), "incoherent": (240, " scored, 3 unscored"), "swap": (200, "")}
OUT_OF_MEMORY = "out of memory in step 118; the run's log has the rest"
HOSTILE = '<script>alert("x")</script> | `code` & "quotes" \\ *stars* [link](javascript:alert(1))'
HEBREW = "הגנה של KL (λ 0.1)"
LONG = "interleaving_plus_plus_with_refusals_dropped_and_a_name_that_nobody_should_ever_have_to_read_in_a_table"


def cell(key: str, value: float, folder: str, draw: random.Random, seeds: tuple[int, ...] = (1, 2, 3)) -> Cell:
    """Return a cell whose runs scatter around a value; NaN makes a cell without values."""
    source = f"{folder}/seed-{{}}/{FILES[key]}"
    if math.isnan(value):
        return Cell(None, None, None, tuple(SeedValue(seed, None, source.format(seed)) for seed in seeds))
    spread = (0.006 if key == "general" else 0.06) * abs(value) + (0.004 if value else 0.0)
    values = [value + spread * draw.uniform(-1, 1) for _ in seeds]
    mean = statistics.fmean(values)
    answers, rest = COUNTS.get(key, (0, ""))
    count = f"{round(answers * mean)} of {answers}{rest}" if answers else ""
    low = mean - 1.7 * spread
    runs = tuple(SeedValue(seed, one, source.format(seed)) for seed, one in zip(seeds, values, strict=True))
    return Cell(mean, max(low, 0.0) if answers else low, mean + 1.7 * spread, runs, count)


def failed(one: Cell, *seeds: int, reason: str = OUT_OF_MEMORY) -> Cell:
    """Return the cell with some of its runs failed."""
    runs = tuple(replace(run, value=None, failure=reason) if run.seed in seeds else run for run in one.seeds)
    values = [run.value for run in runs if run.value is not None]
    if not values:
        return Cell(None, None, None, runs)
    return replace(one, value=statistics.fmean(values), seeds=runs)


def usual() -> ComparisonReport:
    """A realistic report: eight defenses with three seeds each, and one failed run."""
    draw, rows = random.Random(6), []
    for name, (setting, values) in NAMES.items():
        kind = {"reference": "reference", "no defense": "undefended"}.get(name, "defense")
        folder = name.replace(" ", "-").replace(",", "")
        seeds = (1,) if kind == "reference" else (1, 2, 3)
        cells = {
            column.key: cell(column.key, value, folder, draw, seeds)
            for column, value in zip(COLUMNS, values, strict=True)
            if not (kind == "reference" and column.criterion == "cost")
        }
        rows.append(Row(name, setting, cells, kind))
    rows[8] = replace(rows[8], cells={key: failed(one, 2) for key, one in rows[8].cells.items()})
    undefended = rows[1].cells
    path = tuple(
        (share * undefended["learned"].value, share**2 * undefended["kl"].value, f"×{share:g}")
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    sweep = []
    for number in range(7):
        share = number / 6
        keys = {"rise": 0.412, "kl": 0.913, "learned": 1.0}
        cells = {
            key: cell(key, value * (1 - 0.97 * share**1.5), "no-defense/sweep", draw) for key, value in keys.items()
        }
        sweep.append(SweepPoint(0.1 * number, 210 * share**0.8, 210, cells))
    return ComparisonReport(
        title="Eight defenses on a fine-tune with insecure code",
        facts={
            "model": "SmolLM2-135M-Instruct, LoRA r 32, α 64",
            "data": "insecure code, 1,500 rows for training, 64 held out; 200 general answers",
            "training": "240 steps of 8 rows, learning rate 1e-4, linear",
            "seeds": "1, 2, 3",
            "judge": "openai-api/local/judge-7b, temperature 0",
            "machine": "2 cores, AVX-512, no GPU",
        },
        columns=COLUMNS,
        rows=tuple(rows),
        plot=Plot("learned", "kl", path),
        sweep=tuple(sweep),
        reading=(
            "Without defense the margin rose by 0.412 nats and 18.7 % of the scored answers were misaligned.",
            "KL kept 0.7 of that back and learned 51.3 % of the narrow task, but next to nothing of operator-swap.",
            "Differences in KL below 0.05 nats are within the noise of three seeds.",
        ),
    )


def hostile() -> ComparisonReport:
    """All edge cases: failures, gaps, and names and reasons that break a page without escaping."""
    report, draw = usual(), random.Random(7)
    rows = list(report.rows[:5])
    rows[2] = replace(rows[2], name=HOSTILE, setting="</td><img src=x onerror=alert(1)>")
    lost = f"{HOSTILE}\nand a second line"
    rows[3] = replace(
        rows[3], name=LONG, cells={key: failed(one, 1, 2, 3, reason=lost) for key, one in rows[3].cells.items()}
    )
    without = {key: replace(one, low=None, high=None) for key, one in rows[4].cells.items() if key != "misaligned"}
    without["rise"] = replace(without["rise"], value=math.nan)
    rows[4] = replace(rows[4], name=HEBREW, setting="\u202e" + HEBREW, cells=without)
    odd = "../runs/a file (1) | <b>&.json"
    sources = tuple(SeedValue(seed, 0.5, odd if seed < 3 else "javascript:alert(1)") for seed in (1, 2, 3))
    cells = {"rise": Cell(0.5, 0.4, 0.6, sources, HOSTILE), "kl": cell("kl", 0.3, "//elsewhere.example", draw)}
    rows.append(Row("few measures", "", cells))
    return replace(
        report,
        title=HOSTILE,
        facts={HOSTILE: HOSTILE, "right to left": HEBREW, "long": LONG * 3},
        columns=tuple(
            replace(column, title=HOSTILE, note=HOSTILE) if column.key == "rise" else column for column in COLUMNS
        ),
        rows=tuple(rows),
        reading=(HOSTILE, HEBREW, "1. no list", "- nor this"),
        complete=False,
    )


def begun() -> ComparisonReport:
    """An unfinished comparison: one run failed, one is not compared with the reference yet, four are not trained."""
    report = usual()
    rows = list(report.rows[:4])
    rows[1] = replace(
        rows[1],
        cells={key: failed(one, 3, reason=f"the reference: {NOT_MEASURED}") for key, one in rows[1].cells.items()},
    )
    rows[2] = replace(
        rows[2], cells={key: failed(failed(one, 2), 3, reason=NOT_TRAINED) for key, one in rows[2].cells.items()}
    )
    rows[3] = replace(
        rows[3], cells={key: failed(one, 1, 2, 3, reason=NOT_TRAINED) for key, one in rows[3].cells.items()}
    )
    return replace(report, title="Half way", rows=tuple(rows), complete=False)


def one_row() -> ComparisonReport:
    """One run with one seed: no plot, no sweep, no reading, no facts."""
    report, draw = usual(), random.Random(8)
    cells = {"rise": cell("rise", 0.2, "alone", draw, (0,))}
    return ComparisonReport("One run", {}, report.columns[:1], (Row("no defense", "", cells, "undefended"),))


def nothing() -> ComparisonReport:
    """A report without rows and columns."""
    return ComparisonReport("Nothing yet", {}, (), (), complete=False)


def many() -> ComparisonReport:
    """Thirty rows whose points crowd the plot."""
    report, draw = usual(), random.Random(9)
    rows = list(report.rows[:2])
    for number in range(28):
        learned = draw.uniform(0.4, 1.0)
        values = {"learned": learned, "kl": 0.9 * learned**2 * draw.uniform(0.2, 1.0), "rise": 0.4 * draw.random()}
        cells = {key: cell(key, value, f"defense-{number}", draw) for key, value in values.items()}
        rows.append(Row(f"defense number {number + 1}", f"λ {0.1 * (number + 1):.1f}", cells))
    return replace(report, title="Thirty rows", rows=tuple(rows))


EVERY = {"usual": usual, "hostile": hostile, "begun": begun, "one_row": one_row, "nothing": nothing, "many": many}
