"""Layer, kind and display order of modules, from their names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

AFTER_THE_LAYERS = {"lm_head", "embed_out", "score", "classifier"}
DIGITS = re.compile(r"(\d+)")


def layer_of(name: str) -> int | None:
    """Return the number of a module's layer: the first number in its path; None outside the layers."""
    *owners, _ = name.split(".")
    return next((int(owner) for owner in owners if owner.isdecimal()), None)


def is_after_the_layers(name: str) -> bool:
    """Return whether a module outside the layers comes after them, like a head."""
    return name.rpartition(".")[2] in AFTER_THE_LAYERS


def kinds(names: Iterable[str]) -> dict[str, str]:
    """Return a name for each module that is the same in every layer and for every expert.

    It is the shortest ending of the path, without numbers, that distinguishes the modules: `q_proj`, but `attn.c_proj`
    and `mlp.c_proj` in GPT-2.
    """
    paths = {name: _without_numbers(name) for name in names}
    ends = {path: _shortest_end(path, set(paths.values()) - {path}) for path in set(paths.values())}
    return {name: ".".join(ends[path]) for name, path in paths.items()}


def natural_order(name: str) -> tuple[int, tuple[tuple[int, str], ...]]:
    """Return a sort key: modules before the layers, layer 2 before layer 10, modules after the layers."""
    outside = layer_of(name) is None
    side = (1 if is_after_the_layers(name) else -1) if outside else 0
    words = (word for word in DIGITS.split(name) if word)
    return side, tuple((int(word), "") if word.isdecimal() else (-1, word) for word in words)


def _without_numbers(name: str) -> tuple[str, ...]:
    *owners, leaf = name.split(".")
    return *(owner for owner in owners if not owner.isdecimal()), leaf


def _shortest_end(path: tuple[str, ...], others: set[tuple[str, ...]]) -> tuple[str, ...]:
    ends = (path[-length:] for length in range(1, len(path) + 1))
    return next((end for end in ends if all(other[-len(end) :] != end for other in others)), path)
