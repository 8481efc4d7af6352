"""The defences' terms in the loss of one micro-batch, each scaled so that a window's add up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safelora_fast.defenses.kl import KL
from safelora_fast.defenses.nonfinite_errors import name_culprit, penalty_culprit
from safelora_fast.models.distributed import world_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.defenses.base import BatchDefense, Observation
    from safelora_fast.defenses.parts.safe_modules import SafeModules
    from safelora_fast.defenses.subspace_penalty import SubspacePenalty
    from safelora_fast.training.metrics import Meter
    from safelora_fast.training.optimizer_steps import Steps
    from safelora_fast.training.shared_logits import SharedTask
    from safelora_fast.training.window import Totals


def batch_terms(
    defenses: Sequence[BatchDefense],
    observation: Observation,
    totals: Totals,
    *,
    factor: float,
    task: SharedTask | None,
    meter: Meter,
    steps: Steps,
) -> torch.Tensor:
    """The terms that depend on what the model computes, and the task's loss where the KL computes it.

    Args:
        defenses: the defences, each with its weight.
        observation: what model and reference gave for this micro-batch.
        totals: the window's denominators.
        factor: multiplies the defences, not the task loss.
        task: the task's part in the KL's logits; None where the task has its own.
        meter: is told each defence's share of its mean.
        steps: is told of a defence that is not finite.

    Returns:
        A float32 scalar on the device of the hidden states.
    """
    assert observation.student.hidden is not None  # noqa: S101
    device = observation.student.hidden.device
    means: list[tuple[BatchDefense, torch.Tensor]] = []
    result = torch.zeros((), device=device)
    kl = None
    for defense in defenses:
        weight, units = factor * defense.weight * world_size(), totals.units[defense.name]
        if task is not None and isinstance(defense, KL):
            kl, shared = defense, task.compute(defense, observation, weight / max(units, 1))
            means.append((defense, shared.kl / max(units, 1)))
            result = result + shared.loss
        else:  # also without a unit: where the head is sharded, the others wait to gather it
            mean = defense.total(observation).to(device) / max(units, 1)
            means.append((defense, mean.detach()))
            result = result + weight * mean
    finite = torch.stack([mean for _, mean in means]).isfinite().tolist() if means else []
    if not all(finite):
        culprit = next(defense for (defense, _), good in zip(means, finite, strict=True) if not good)
        steps.not_finite(name_culprit(culprit, observation, steps.coming))
        return torch.zeros((), device=device) if kl is None or task is None else task.alone(kl, observation).loss
    for defense, mean in means:
        meter.add(defense.name, mean)
    return result


def penalty_term(
    defense: SubspacePenalty, modules: SafeModules, totals: Totals, *, meter: Meter, steps: Steps
) -> torch.Tensor:
    """The penalty's share of this micro-batch: the window's add up to it once, whatever the processes."""
    penalties = modules.penalties()
    values = torch.stack([value.to(penalties[0][1].device) for _, value in penalties])
    if not values.detach().isfinite().all():
        steps.not_finite(penalty_culprit(penalties, steps.coming))
        return torch.zeros(())
    share = values.sum() / totals.micro_batches
    meter.add(defense.name, share / world_size())
    return defense.weight * share
