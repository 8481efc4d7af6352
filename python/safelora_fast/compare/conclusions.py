"""What the figures say, in sentences that follow from them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias

from safelora_fast.compare.columns import MARGIN_RISE
from safelora_fast.compare.differences import pool_differences
from safelora_fast.compare.number_text import format_ends
from safelora_fast.compare.pooling import Outcome, pool

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.compare.config import CompareConfig
    from safelora_fast.compare.report import Column

NATS = "nats"
CHANCE = 0.05
UNITS = {"%": "points", NATS: "nats a token"}
Verdict: TypeAlias = Literal["clear", "unclear", "unknown", "apart"]
# Of all measures, and of some.
WITHOUT: dict[Verdict, tuple[str, str]] = {
    "unclear": ("no clear difference", "no clear difference in {}"),
    "unknown": ("nothing can be said, for no error is known", "nothing can be said of {}, whose error is not known"),
    "apart": ("no seed has figures of both", "no seed has both figures of {}"),
}


def read_figures(
    config: CompareConfig,
    columns: Sequence[Column],
    samples: Mapping[str, Mapping[str, Mapping[int, Outcome]]],
) -> tuple[str, ...]:
    """Sentences on each defence beside the first run, paired by seed and cluster."""
    first = config.runs[0].name
    known = {column.key: column for column in columns if column.key in samples[first]}
    sentences = [*_of_the_first(first, samples[first])]
    titles, count = [column.title for column in known.values()], 0
    for run in config.runs[1:]:
        said: dict[Verdict, list[str]] = {"clear": [], "unclear": [], "unknown": [], "apart": []}
        for key, column in known.items():
            verdict, words = _change(samples[run.name].get(key, {}), samples[first].get(key, {}), column)
            said[verdict].append(words)
        count += len(said["clear"]) + len(said["unclear"])
        if known:
            sentences.append(f"{run.name} beside {first}: {'; '.join(_parts(said, titles))}.")
    return (*sentences, *_caveats(config, count))


def _parts(said: Mapping[Verdict, Sequence[str]], titles: Sequence[str]) -> list[str]:
    """What is said of one run: its differences, then the measures of which none is told, by the reason."""
    parts = list(said["clear"])
    for verdict, (of_all, of_some) in WITHOUT.items():
        if said[verdict]:
            parts.append(of_all if said[verdict] == titles else of_some.format(", ".join(said[verdict])))
    return parts


def _of_the_first(first: str, samples: Mapping[str, Mapping[int, Outcome]]) -> list[str]:
    margin = list(samples.get(MARGIN_RISE, {}).values())
    if not margin:
        return []
    pooled = pool(margin)
    low, high = pooled.interval.low, pooled.interval.high
    value, least, most = format_ends(pooled.value, low, high, NATS)
    said = f"{first}: the margin of misaligned answers changed by {value} nats a token ({least} to {most})"
    if low > 0:
        return [f"{said}: this fine-tune did make misaligned answers likelier."]
    if high < 0:
        return [f"{said}: it fell, so there is no misalignment here for a defence to prevent."]
    return [f"{said}: no clear rise, so there is little here for a defence to prevent."]


def _change(own: Mapping[int, Outcome], first: Mapping[int, Outcome], column: Column) -> tuple[Verdict, str]:
    """A difference in words, or the measure, and whether the interval leaves zero out.

    Where one run lacks a seed that the other has, the table shows other means: the seeds that both have are named.
    """
    pooled = pool_differences(own, first, share=column.unit == "%")
    if pooled is None:
        return "apart", column.title
    low, high = pooled.interval.low, pooled.interval.high
    both = sorted(own.keys() & first.keys())
    seeds = f"seed{'s' if len(both) > 1 else ''} {', '.join(map(str, both))} alone"
    where = "" if own.keys() == first.keys() else seeds
    if math.isnan(low) or not (low > 0 or high < 0):
        return "unknown" if math.isnan(low) else "unclear", f"{column.title} ({where})" if where else column.title
    unit = UNITS.get(column.unit, column.unit)
    way = "higher" if pooled.value > 0 else "lower"
    near, far = sorted((abs(low), abs(high)))
    size, least, most = format_ends(abs(pooled.value), near, far, column.unit)
    by = f"{size} {unit}".rstrip()
    ends = f"{least} to {most}; {where}" if where else f"{least} to {most}"
    return "clear", f"{column.title} {way} by {by} ({ends})"


def _caveats(config: CompareConfig, count: int) -> list[str]:
    said = []
    if len(config.seeds) == 1:
        said.append(
            "There is one seed: the intervals are of the items alone and know nothing of the noise between runs."
        )
    if count > 1:
        said.append(
            f"These are {count} comparisons at 95 %, of which {count * CHANCE:.2g} would look clear by chance alone, on "
            "average, if no defense did anything."
        )
    return said
