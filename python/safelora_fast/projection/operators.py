"""The operators of a projection, in one table: everything else reads it, from the command line to the Rust extension.

CONTRIBUTING.md says how to add one; docs/methods.md explains them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from safelora_fast import _core

if TYPE_CHECKING:
    from collections.abc import Mapping

Name = Literal["safelora", "orthogonal", "attenuate", "zero"]
Normalize = Literal["frobenius", "spectral"]
Sides = Literal["both", "left"]
HOW_MUCH = "how much of V to keep, e.g. rank 64"


@dataclass(frozen=True)
class Operator:
    """An operator, or one form of it.

    Attributes:
        name: as `--operator` spells it.
        words: what it is called in titles and cards.
        formula: what B becomes, and A if it changes.
        variant: the constructor of `_core.Operator`, and the name of its arithmetic on a device.
        form: the setting that chooses between the forms of an operator, and its value for this form; the first is the default.
        arguments: settings that the constructor takes by name.
        required: groups of arguments, of which exactly one must be given, with what it says.
    """

    name: Name
    words: str
    formula: str
    variant: str
    form: tuple[str, str] | None = None
    arguments: tuple[str, ...] = ()
    required: tuple[tuple[tuple[str, ...], str], ...] = ()

    def in_rust(self, settings: Mapping[str, Any]) -> _core.Operator:
        """The operator that the extension runs."""
        make = getattr(_core.Operator, self.variant)
        given = {name: settings[name] for name in self.arguments if settings[name] is not None}
        made: _core.Operator = make(**given)
        return made

    def title(self, settings: Mapping[str, Any]) -> str:
        """The operator with its numbers, in words."""
        numbers = {name: settings.get(name) for name in self.arguments}
        given = [f"{name} {value:g}" for name, value in numbers.items() if isinstance(value, int | float)]
        return f"{self.words} ({', '.join(given)})" if given else self.words


OPERATORS = (
    Operator("safelora", "SafeLoRA", "V·Vᵀ·B/‖V‖_F", "frobenius", form=("normalize", "frobenius")),
    Operator("safelora", "spectral SafeLoRA", "V·Vᵀ·B/σ₁(V)²", "spectral", form=("normalize", "spectral")),
    Operator(
        "orthogonal",
        "the orthogonal projection",
        "U_k·U_kᵀ·B",
        "orthogonal",
        arguments=("rank", "energy"),
        required=((("rank", "energy"), HOW_MUCH),),
    ),
    *(
        Operator(
            "attenuate",
            words,
            formula,
            "attenuate",
            form=("sides", sides),
            arguments=("rank", "energy", "keep", "sides"),
            required=((("rank", "energy"), HOW_MUCH), (("keep",), "the share of the rest that stays, e.g. keep 0.1")),
        )
        for sides, words, formula in (
            ("both", "attenuation", "U_k·U_kᵀ·B + keep·(B − U_k·U_kᵀ·B), A ← A·W_k·W_kᵀ + keep·(A − A·W_k·W_kᵀ)"),
            ("left", "attenuation of B", "U_k·U_kᵀ·B + keep·(B − U_k·U_kᵀ·B)"),
        )
    ),
    Operator("zero", "the zero control", "0", "zero"),
)


def operator_of(settings: Mapping[str, Any]) -> Operator:
    """The operator that settings name; the first form where they name none."""
    return next(
        operator
        for operator in OPERATORS
        if operator.name == settings["operator"]
        and (operator.form is None or settings.get(operator.form[0]) in {None, operator.form[1]})
    )


def owners(argument: str) -> list[str]:
    """The operators that take an argument; none of a setting that belongs to no operator."""
    takers = (
        operator.name
        for operator in OPERATORS
        if argument in operator.arguments or argument in (operator.form or ())[:1]
    )
    return list(dict.fromkeys(takers))
