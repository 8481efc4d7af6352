"""The defenses' loss terms of one micro-batch, scaled so that summing over an optimizer step gives the mean."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from safelora_fast.defenses.base import SharesLogits
from safelora_fast.errors import TrainingError
from safelora_fast.models.distributed import sum_over_ranks, world_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.data.spans import Spans
    from safelora_fast.defenses.base import Attached, BatchDefense, Observation, Weighted
    from safelora_fast.ops.linear_kl import SharedLoss
    from safelora_fast.training.metrics import Sums
    from safelora_fast.training.optimizer_steps import Steps
    from safelora_fast.training.training_passes import Recorded


@dataclass(frozen=True)
class Totals:
    """The denominators of one optimizer step.

    Attributes:
        units: units of each defense over the whole window and all processes.
        labels: labels of the task loss over the whole window and all processes.
        micro_batches: micro-batches of the window on each process.
    """

    units: Mapping[str, int]
    labels: int
    micro_batches: int


def count_totals(defenses: Sequence[BatchDefense], window: Sequence[Spans]) -> Totals:
    """Count the units of a window of micro-batches over all processes. Collective."""
    counts = [float(sum(defense.units(spans) for spans in window)) for defense in defenses]
    counts.append(float(sum(spans.labels for spans in window)))
    device = window[0].real.device if window else torch.device("cpu")
    *units, labels = (int(count) for count in sum_over_ranks(counts, device))
    names = (defense.name for defense in defenses)
    return Totals(dict(zip(names, units, strict=True)), labels, max(len(window), 1))


@dataclass
class SharedTask:
    """The task loss of one micro-batch, computed by a defense from the same logits.

    Attributes:
        label_weight: weight of the negative log-likelihood of one label in the loss.
        figures: whether to return the values of every token.
        shared: the result of the defense; None before :meth:`compute`.
    """

    label_weight: torch.Tensor | float
    figures: bool
    shared: SharedLoss | None = None

    def compute(self, defense: SharesLogits, observation: Observation, weight: float) -> SharedLoss:
        """Compute both losses. `weight` is the weight of one unit of the defense."""
        self.shared = defense.with_cross_entropy(
            observation, weight=weight, cross_entropy_weight=self.label_weight, figures=self.figures
        )
        return self.shared


class LossTerms:
    """Adds up the loss terms of one model's defenses.

    Args:
        defenses: the defenses whose term depends on the batch.
        attached: the weighted defenses that have state, with it. Their terms may depend on weights alone.
        sums: collects each defense's share of its mean, before the weight.
        steps: handles a defense that is not finite.
    """

    def __init__(
        self,
        defenses: Sequence[BatchDefense],
        attached: Sequence[tuple[Weighted, Attached]],
        *,
        sums: Sums,
        steps: Steps,
    ) -> None:
        self._defenses, self._attached, self._sums, self._steps = defenses, attached, sums, steps
        self._states = {defense.name: state for defense, state in attached}

    def of_batch(self, recorded: Recorded, totals: Totals, *, factor: float, task: SharedTask | None) -> torch.Tensor:
        """Return the terms that depend on the batch, plus the task loss if a defense computes it.

        Args:
            recorded: tokens and hidden states of this micro-batch.
            totals: the window's denominators.
            factor: multiplies the defenses, not the task loss.
            task: the task loss to compute from a defense's logits; None if the model computes it.

        Returns:
            A float32 scalar on the device of the hidden states.
        """
        assert recorded.student.hidden is not None  # noqa: S101
        device = recorded.student.hidden.device
        means: list[tuple[BatchDefense, torch.Tensor]] = []
        result = recorded.student.hidden[:0].sum(dtype=torch.float32)  # zero, with a gradient function
        sharing: SharesLogits | None = None
        for defense in self._defenses:
            units = max(totals.units[defense.name], 1) * defense.sample
            weight = factor * defense.weight * world_size()
            if task is not None and sharing is None and isinstance(defense, SharesLogits):
                sharing, shared = defense, task.compute(defense, recorded.whole(defense), weight / units)
                means.append((defense, shared.kl / units))
                result = result + shared.loss
            elif (examples := recorded.examples(defense)) is not None:
                # also with 0 units: if the head is sharded, other processes wait here to gather it
                seen = replace(examples, attached=self._states.get(defense.name))
                mean = defense.loss(seen).to(device) / units
                means.append((defense, mean.detach()))
                result = result + weight * mean
        finite = torch.stack([mean for _, mean in means]).isfinite().tolist() if means else []
        if not all(finite):
            defense = means[finite.index(False)][0]
            self._not_finite(defense, _first_bad_states(recorded.examples(defense) or recorded.whole(defense)))
            if task is None or sharing is None:
                return torch.zeros((), device=device)
            # Compute the task loss without the reference states, which may be the ones that are not finite.
            whole = recorded.whole(sharing)
            return task.compute(sharing, replace(whole, reference=whole.student), 0.0).loss
        for defense, mean in means:
            self._sums.add(defense.name, mean)
        return result

    def of_weights(self, totals: Totals) -> torch.Tensor | None:
        """Return this micro-batch's share of the weight terms; a window's shares sum to them, for any number of processes."""
        total: torch.Tensor | None = None
        for defense, attached in self._attached:
            penalties = attached.penalties()
            if not penalties:
                continue
            values = torch.stack([value.to(penalties[0][1].device) for _, value in penalties])
            if not values.detach().isfinite().all():
                self._not_finite(defense, f"module {next(name for name, value in penalties if not value.isfinite())}")
                continue
            share = values.sum() / totals.micro_batches
            self._sums.add(defense.name, share / world_size())
            term = defense.weight * share
            total = term if total is None else total + term.to(total.device)
        return total

    def _not_finite(self, defense: Weighted, where: str) -> None:
        self._steps.not_finite(
            TrainingError(
                f"defense {defense.name} is not finite{self._steps.coming}: {where}; "
                'lower the learning rate or the weight, or set on_nonfinite="skip"'
            )
        )


def _first_bad_states(observation: Observation) -> str:
    """Describe the first hidden states that are not finite."""
    mask = observation.spans.real
    both = [("reference", observation.reference), ("model", observation.student)]
    if observation.reference is observation.student or observation.reference.part is not observation.student.part:
        del both[0]  # no reference pass ran, or not on these examples

    def bad(states: torch.Tensor | None) -> bool:
        return states is not None and not states[mask.to(states.device)].isfinite().all()

    for index in sorted(observation.reference.layers):
        for who, capture in both:
            if bad(capture.layers[index]):
                return f"layer {index} of the {who} gives NaN or Inf"
    for who, capture in both:
        if bad(capture.hidden):
            return f"the last layer's output (after the final norm) of the {who} holds NaN or Inf"
    return "all hidden states are finite, so it arose in the defense itself"
