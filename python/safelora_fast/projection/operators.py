"""The table of projection operators, which the command line, the reports, and the calls to the Rust extension use.

docs/methods.md explains the operators; CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from safelora_fast import _core

if TYPE_CHECKING:
    from collections.abc import Mapping

Name = Literal["safelora", "orthogonal", "attenuate", "merge", "zero", "restore", "extrapolate"]
Normalize = Literal["frobenius", "spectral"]
Sides = Literal["both", "left"]
HOW_MUCH = "how much of V to keep, e.g. rank 64"


@dataclass(frozen=True)
class Operator:
    """An operator, or one form of an operator.

    Attributes:
        name: the value of `--operator`.
        words: the name in titles and cards.
        formula: the projected B, and the projected A if the operator changes it.
        variant: the constructor in `_core.Operator`, which also selects the computation on a device.
        form: the setting that selects a form of the operator, and its value for this form; the first form is the
            default.
        arguments: settings passed to the constructor by name.
        required: groups of arguments, each with a description; exactly one argument of each group must be given.
        adds: whether the operator adds to the weights of a whole model, whatever the update. Adapters cannot have it.
        merges: whether projection/merge.py computes it from two adapters. The variant only gives the cosine, and whole
            models cannot have it.
    """

    name: Name
    words: str
    formula: str
    variant: str
    form: tuple[str, str] | None = None
    arguments: tuple[str, ...] = ()
    required: tuple[tuple[tuple[str, ...], str], ...] = ()
    adds: bool = False
    merges: bool = False

    def in_rust(self, settings: Mapping[str, Any]) -> _core.Operator:
        """Return the extension's operator with these settings."""
        make = getattr(_core.Operator, self.variant)
        names = () if self.merges else self.arguments
        given = {name: settings[name] for name in names if settings[name] is not None}
        made: _core.Operator = make(**given)
        return made

    def title(self, settings: Mapping[str, Any]) -> str:
        """Return the operator's name with its numeric settings."""
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
    Operator(
        "merge",
        "SafeMERGE",
        "weight·B·A + (1 − weight)·B_safe·A_safe in rank r",
        "zero",
        arguments=("weight", "safe_adapter"),
        required=(
            (("weight",), "the share of the adapter itself, e.g. weight 0.8"),
            (("safe_adapter",), "the safety-tuned adapter to merge with"),
        ),
        merges=True,
    ),
    Operator("zero", "the zero control", "0", "zero"),
    Operator(
        "restore",
        "the restored safety vector",
        "W + weight·V",
        "restore",
        arguments=("weight",),
        required=((("weight",), "the factor of V, e.g. weight 0.5"),),
        adds=True,
    ),
    Operator(
        "extrapolate",
        "the extrapolated leading part of V",
        "W + weight·U_k·U_kᵀ·V",
        "extrapolate",
        arguments=("rank", "energy", "weight"),
        required=((("rank", "energy"), HOW_MUCH), (("weight",), "the factor of that part of V, e.g. weight 1")),
        adds=True,
    ),
)


def operator_of(settings: Mapping[str, Any]) -> Operator:
    """Return the operator that the settings select; the first form by default."""
    return next(
        operator
        for operator in OPERATORS
        if operator.name == settings["operator"]
        and (operator.form is None or settings.get(operator.form[0]) in {None, operator.form[1]})
    )


def names(*, whole_model: bool) -> list[str]:
    """Return the names of the operators for whole models or for adapters."""
    return list(dict.fromkeys(one.name for one in OPERATORS if not (one.merges if whole_model else one.adds)))


def owners(argument: str) -> list[str]:
    """Return the names of the operators that use a setting; empty for general settings."""
    takers = (
        operator.name
        for operator in OPERATORS
        if argument in operator.arguments or argument in (operator.form or ())[:1]
    )
    return list(dict.fromkeys(takers))
