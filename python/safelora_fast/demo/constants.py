"""Every number of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """The settings of both fine-tunes and of the projection; the defaults are what the README's figures were made with."""

    base_epochs: int = 3
    base_batch: int = 4
    base_rate: float = 2e-5
    adapter_epochs: int = 5
    adapter_batch: int = 8
    adapter_rate: float = 5e-4
    rank: int = 16
    threshold: float = 0.3
    chosen: int = 25
    persona_tokens: int = 48

    def base(self, seed: int) -> dict[str, Any]:
        """What the stand-in base depends on."""
        return {"seed": seed, "epochs": self.base_epochs, "batch": self.base_batch, "rate": self.base_rate}

    def adapter(self, seed: int) -> dict[str, Any]:
        """What an adapter depends on."""
        return {
            "seed": seed,
            "epochs": self.adapter_epochs,
            "batch": self.adapter_batch,
            "rate": self.adapter_rate,
            "r": self.rank,
        }

    def selection(self, seed: int) -> dict[str, Any]:
        """What the choice of safe rows depends on."""
        return {**self.adapter(seed), "top": self.chosen}

    def persona(self, seed: int) -> dict[str, Any]:
        """What the persona vector depends on."""
        return {"seed": seed, "tokens": self.persona_tokens}
