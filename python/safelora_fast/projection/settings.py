"""The settings of a projection, checked before any file is read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from safelora_fast.errors import SettingsError
from safelora_fast.files.argument_checks import number, patterns, whole_number
from safelora_fast.projection.operators import Name, Normalize, Operator, Sides, names, operator_of, owners

Select = Literal["threshold", "number", "all"]


class Option(NamedTuple):
    """A command-line option: its help, its type (a Literal, `str`, `int` or `float`), and the range of a number.

    `above` excludes `low` itself from the range. `select` is the only selection that the setting applies to.
    """

    help: str
    values: Any
    metavar: str | None = None
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    select: Select | None = None

    def check(self, name: str, value: Any) -> Any:
        """Return the checked value; NumPy numbers become Python numbers.

        Raises:
            SettingsError: the value has the wrong type or is out of range.
        """
        if self.values is str:
            if not isinstance(value, str | Path) or not str(value):
                raise SettingsError(f"{name} must be a path or a Hub id, not {value!r}")
            return str(value)
        if self.values not in {int, float}:
            if value not in get_args(self.values):
                raise SettingsError(f"{name} must be one of {', '.join(get_args(self.values))}, not {value!r}")
            return value
        value = whole_number(name, value) if self.values is int else number(name, value)
        if not self.low <= value <= self.high or (self.above and value == self.low):
            wanted = f"lie between {self.low} and {self.high}" if self.high < math.inf else f"be at least {self.low}"
            wanted = f"be above {self.low} and at most {self.high}" if self.above else wanted
            raise SettingsError(f"{name} must {wanted}, not {value}")
        return value


# In the order of the help.
OPTIONS = {
    "operator": Option("Operator for the selected modules.", Name),
    "normalize": Option("frobenius (default, as in the paper) or spectral (gain at most 1).", Normalize),
    "rank": Option("Leading singular vectors of V to keep.", int, "K", low=1, high=2**31 - 1),
    "energy": Option("Share of ‖V‖² to keep, instead of --rank.", float, "E", low=0, high=1, above=True),
    "keep": Option("Share to keep of the part outside these directions.", float, "C", low=0, high=1),
    "sides": Option("both (default) changes lora_B and lora_A; left changes only lora_B.", Sides),
    "weight": Option("Factor of what is added, or share of the adapter in a merge.", float, "X", low=-100, high=100),
    "safe_adapter": Option("The safety-tuned adapter.", str, "DIR|HUB_ID[@REV]"),
    "select": Option("Which modules to project, by the paper's cosine for any operator.", Select),
    "threshold": Option("Largest cosine to project. (default 0.5)", float, "T", low=-1, high=1, select="threshold"),
    "num_layers": Option("Number of lowest cosines to project. (default 10)", int, "N", low=1, select="number"),
    "threads": Option(
        "Number of threads. The result does not depend on it. (default: all cores)", int, "N", low=1, high=1024
    ),
}


@dataclass(frozen=True)
class Settings:
    """Settings of one projection (docs/methods.md).

    projection/operators.py lists the operators that use `normalize`, `rank`, `energy`, `keep` and `sides`. `threshold`
    applies to `select="threshold"`, `num_layers` to `select="number"`. None selects the default, if there is one.
    `weight` is for operators that add to whole models, and for "merge", with `safe_adapter`. `exclude` names modules to
    leave unchanged; `strict` rejects adapters with trained tensors other than LoRA factors.

    Raises:
        SettingsError: options contradict each other, are out of range, or have the wrong type.
    """

    whole_model: ClassVar[bool] = False

    operator: Name = "safelora"
    normalize: Normalize | None = None
    rank: int | None = None
    energy: float | None = None
    select: Select = "threshold"
    threshold: float | None = None
    num_layers: int | None = None
    threads: int | None = None
    exclude: tuple[str, ...] = ()
    strict: bool = False
    keep: float | None = None
    sides: Sides | None = None
    weight: float | None = None
    safe_adapter: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", patterns("exclude", self.exclude))
        known = names(whole_model=self.whole_model)
        if self.operator not in known and self.operator in get_args(Name):
            raise SettingsError(f"operator {self.operator} changes whole models, not adapters: use project-model")
        if self.operator not in known:
            raise SettingsError(f"operator must be one of {', '.join(known)}, not {self.operator!r}")
        given = {name: getattr(self, name) for name in OPTIONS}
        given = {name: value for name, value in given.items() if value is not None or name in {"operator", "select"}}
        for name, value in given.items():
            object.__setattr__(self, name, OPTIONS[name].check(name, value))
        for name in given:
            takers, option = owners(name), OPTIONS[name]
            if takers and self.operator not in takers:
                raise SettingsError(f"{name} applies to operator {' and '.join(takers)} only")
            if option.select not in {None, self.select}:
                raise SettingsError(f"{name} applies to select {option.select} only")
        if self.described_operator.merges and self.weight is not None and not 0 <= self.weight <= 1:
            raise SettingsError(f"weight must lie between 0 and 1 in a merge, not {self.weight:g}")
        if self.described_operator.adds and self.select != "all":
            raise SettingsError(f"operator {self.operator} does not depend on the update: give select all")
        for group, what in self.described_operator.required:
            count = len(given.keys() & set(group))
            if count != 1:
                either = f"either {' or '.join(group)}" if len(group) > 1 else group[0]
                wanted = f"one of {' and '.join(group)}, not both" if count else either
                raise SettingsError(f"operator {self.operator} needs {wanted}: {what}")

    @property
    def described_operator(self) -> Operator:
        """The operator's entry in the table of operators."""
        return operator_of(vars(self))

    @property
    def effective_threshold(self) -> float:
        """The threshold; 0.5, as in the paper, by default."""
        return 0.5 if self.threshold is None else self.threshold

    @property
    def effective_num_layers(self) -> int:
        """The number of modules that `select="number"` projects; 10 by default."""
        return 10 if self.num_layers is None else self.num_layers

    def effective(self) -> dict[str, Any]:
        """Return all settings for the report, with the defaults that took effect."""
        form = self.described_operator.form
        return {
            **asdict(self),
            **({} if form is None else dict([form])),
            "threshold": self.effective_threshold if self.select == "threshold" else None,
            "num_layers": self.effective_num_layers if self.select == "number" else None,
        }

    def why(self, cosine: float, *, projected: bool) -> str:
        """Return the reason why a module with this cosine was projected or not."""
        if math.isnan(cosine):
            return "there is no cosine to judge by"
        if self.select == "threshold":
            return f"cosine {'at most' if projected else 'above'} {self.effective_threshold:g}"
        if self.select == "number":
            return f"cosine {'' if projected else 'not '}among the {self.effective_num_layers} lowest"
        return "all modules were selected"


class WholeModelSettings(Settings):
    """Settings of the projection of a whole model."""

    whole_model = True


def chosen(cosines: dict[str, float], settings: Settings) -> set[str]:
    """Return the names of the modules to project, given their cosines; a NaN cosine is never selected.

    Hsu et al. 2024 (arXiv 2405.16833), section 3: a module is projected if its cosine is at most the threshold, or
    among the lowest. Ties go to the name that sorts first.
    """
    known = {name: cosine for name, cosine in cosines.items() if not math.isnan(cosine)}
    if settings.select == "threshold":
        return {name for name, cosine in known.items() if cosine <= settings.effective_threshold}
    if settings.select == "number":
        ranked = sorted(known, key=lambda name: (known[name], name))
        return set(ranked[: settings.effective_num_layers])
    return set(known)
