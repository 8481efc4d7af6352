"""The operators of a projection, in one table: everything else reads it, from the command line to the Rust extension.

CONTRIBUTING.md says how to add one; docs/methods.md explains them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from safelora_fast import _core

if TYPE_CHECKING:
    from collections.abc import Mapping

Name = Literal["safelora", "orthogonal", "zero"]
Normalize = Literal["frobenius", "spectral"]


@dataclass(frozen=True)
class Operator:
    """An operator, or one form of it.

    Attributes:
        name: as `--operator` spells it.
        words: what it is called in titles and cards.
        formula: what B becomes.
        variant: the constructor of `_core.Operator`, and the name of its arithmetic on a device.
        normalize: the form, for an operator that has several.
        arguments: settings that belong to this operator; the constructor takes them by name.
        one_of: the arguments of which exactly one must be given.
    """

    name: Name
    words: str
    formula: str
    variant: str
    normalize: Normalize | None = None
    arguments: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()

    def in_rust(self, settings: Mapping[str, Any]) -> _core.Operator:
        """The operator that the extension runs."""
        make = getattr(_core.Operator, self.variant)
        made: _core.Operator = make(**{name: settings[name] for name in self.arguments})
        return made

    def title(self, settings: Mapping[str, Any]) -> str:
        """The operator with its arguments, in words."""
        given = [f"{name} {settings[name]:g}" for name in self.arguments if settings.get(name) is not None]
        return f"{self.words} ({', '.join(given)})" if given else self.words


OPERATORS = (
    Operator("safelora", "SafeLoRA", "V·Vᵀ·B/‖V‖_F", "frobenius", normalize="frobenius"),
    Operator("safelora", "spectral SafeLoRA", "V·Vᵀ·B/σ₁(V)²", "spectral", normalize="spectral"),
    Operator(
        "orthogonal",
        "the orthogonal projection",
        "U_k·U_kᵀ·B",
        "orthogonal",
        arguments=("rank", "energy"),
        one_of=("rank", "energy"),
    ),
    Operator("zero", "the zero control", "0", "zero"),
)


def operator_of(settings: Mapping[str, Any]) -> Operator:
    """The operator that settings name; without `normalize`, the first form."""
    return next(
        operator
        for operator in OPERATORS
        if operator.name == settings["operator"] and settings.get("normalize") in {None, operator.normalize}
    )


def owners(argument: str) -> list[str]:
    """The operators that take an argument; none of a setting that belongs to no operator."""
    takers = (
        operator.name
        for operator in OPERATORS
        if argument in operator.arguments or (argument == "normalize" and operator.normalize is not None)
    )
    return list(dict.fromkeys(takers))
