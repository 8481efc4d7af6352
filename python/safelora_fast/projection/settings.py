"""What the user asked for, checked as a whole before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from safelora_fast.errors import SettingsError
from safelora_fast.files.argument_checks import number, patterns, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable

Operator = Literal["safelora", "orthogonal", "zero"]
Normalize = Literal["frobenius", "spectral"]
MOST_THREADS = 1024
MOST_RANK = 2**31 - 1  # beyond the sides of any weight
Select = Literal["threshold", "number", "all"]


@dataclass(frozen=True)
class Settings:
    """Settings of one projection (docs/methods.md).

    `normalize` belongs to `safelora`, exactly one of `rank` and `energy` to `orthogonal`, `threshold` and `num_layers`
    to the selection of that name; None means the default where there is one. `exclude` names modules that stay as they are,
    `strict` refuses adapters with trained tensors that are not LoRA factors.

    Raises:
        SettingsError: when options contradict each other, are out of range or of another type.
    """

    operator: Operator = "safelora"
    normalize: Normalize | None = None
    rank: int | None = None
    energy: float | None = None
    select: Select = "threshold"
    threshold: float | None = None
    num_layers: int | None = None
    threads: int | None = None
    exclude: tuple[str, ...] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", patterns("exclude", self.exclude))
        for name in ("rank", "num_layers", "threads"):
            self._convert(name, whole_number)
        for name in ("energy", "threshold"):
            self._convert(name, number)
        self._one_of("operator", self.operator, Operator)
        self._one_of("select", self.select, Select)
        if self.normalize is not None:
            self._one_of("normalize", self.normalize, Normalize)
        self._belongs("normalize", self.normalize, self.operator == "safelora", "operator safelora")
        self._belongs("rank", self.rank, self.operator == "orthogonal", "operator orthogonal")
        self._belongs("energy", self.energy, self.operator == "orthogonal", "operator orthogonal")
        self._belongs("threshold", self.threshold, self.select == "threshold", "select threshold")
        self._belongs("num_layers", self.num_layers, self.select == "number", "select number")
        if self.operator == "orthogonal" and (self.rank is None) == (self.energy is None):
            given = "one of rank and energy, not both" if self.rank is not None else "either rank or energy"
            raise SettingsError(f"operator orthogonal needs {given}: how much of V to keep, e.g. rank 64")
        if self.rank is not None and not 1 <= self.rank <= MOST_RANK:
            raise SettingsError(f"rank must lie between 1 and {MOST_RANK}, not {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise SettingsError(f"energy must be above 0 and at most 1, not {self.energy}")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise SettingsError(
                f"threshold is compared with a cosine: it must lie between -1 and 1, not {self.threshold}"
            )
        if self.num_layers is not None and self.num_layers < 1:
            raise SettingsError(f"num_layers must be at least 1, not {self.num_layers}")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise SettingsError(f"threads must lie between 1 and {MOST_THREADS}, not {self.threads}")

    def _convert(self, name: str, kind: Callable[[str, object], float]) -> None:
        """Make a number that came as one of numpy's, say, a plain one."""
        value = getattr(self, name)
        if value is not None:
            object.__setattr__(self, name, kind(name, value))

    @staticmethod
    def _one_of(name: str, value: str, choices: object) -> None:
        allowed: tuple[str, ...] = choices.__args__  # type: ignore[attr-defined]
        if value not in allowed:
            raise SettingsError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")

    @staticmethod
    def _belongs(name: str, value: object, fits: bool, where: str) -> None:
        if value is not None and not fits:
            raise SettingsError(f"{name} applies to {where} only")

    @property
    def effective_threshold(self) -> float:
        """The threshold, the paper's 0.5 where none was given."""
        return 0.5 if self.threshold is None else self.threshold

    @property
    def effective_num_layers(self) -> int:
        """How many modules `select number` projects: 10 where it was not given."""
        return 10 if self.num_layers is None else self.num_layers

    def effective(self) -> dict[str, object]:
        """The defaults that took effect, for the report."""
        return {
            "normalize": (self.normalize or "frobenius") if self.operator == "safelora" else None,
            "threshold": self.effective_threshold if self.select == "threshold" else None,
            "num_layers": self.effective_num_layers if self.select == "number" else None,
        }

    def why(self, cosine: float, *, projected: bool) -> str:
        """Why a module with this cosine was projected or not, in words."""
        if math.isnan(cosine):
            return "there is no cosine to judge by"
        if self.select == "threshold":
            return f"cosine {'at most' if projected else 'above'} {self.effective_threshold:g}"
        if self.select == "number":
            return f"cosine {'' if projected else 'not '}among the {self.effective_num_layers} lowest"
        return "all modules were selected"


def chosen(cosines: dict[str, float], settings: Settings) -> set[str]:
    """The modules to project, by name, from their cosines; a NaN cosine is never chosen.

    Hsu et al. 2024 (arXiv 2405.16833), section 3: a module is projected when its cosine is at most the threshold, or
    when it is among the lowest; ties go to the name that sorts first.
    """
    known = {name: cosine for name, cosine in cosines.items() if not math.isnan(cosine)}
    if settings.select == "threshold":
        return {name for name, cosine in known.items() if cosine <= settings.effective_threshold}
    if settings.select == "number":
        ranked = sorted(known, key=lambda name: (known[name], name))
        return set(ranked[: settings.effective_num_layers])
    return set(known)
