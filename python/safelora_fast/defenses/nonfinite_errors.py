"""Say which defence, block and step a NaN or an infinity came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.errors import TrainingError

if TYPE_CHECKING:
    import torch

    from safelora_fast.defenses.base import BatchDefense, Observation


def name_culprit(defense: BatchDefense, observation: Observation, step: str) -> TrainingError:
    """The error for a defence that is not finite, naming the first hidden states that are not.

    Args:
        defense: the defence.
        observation: what it looked at.
        step: the step in words, or nothing where steps are not counted.
    """
    where = _first_bad_states(observation) or "all hidden states are finite, so it arose in the defence itself"
    return TrainingError(
        f"defence {defense.name} is not finite{step}: {where}; "
        'lower the learning rate or the weight, or set on_nonfinite="skip"'
    )


def penalty_culprit(penalties: list[tuple[str, torch.Tensor]], step: str) -> TrainingError:
    """The error for a penalty on the weights that is not finite, naming the first module."""
    name = next(name for name, value in penalties if not value.isfinite())
    return TrainingError(
        f"defence subspace_penalty is not finite{step}: module {name}; "
        'lower the learning rate or the weight, or set on_nonfinite="skip"'
    )


def projection_culprit(name: str, step: int) -> TrainingError:
    """The error for a module that cannot be projected because its factor is not finite; it is left as it is."""
    return TrainingError(
        f"defence safelora is not finite after optimiser step {step}: lora_B of module {name} holds NaN or Inf; "
        "lower the learning rate, or clip the gradients"
    )


def _first_bad_states(observation: Observation) -> str | None:
    mask = observation.spans.real
    for index in sorted(observation.reference.blocks):
        for who, capture in (("reference", observation.reference), ("model", observation.student)):
            states = capture.blocks[index]
            if not states[mask.to(states.device)].isfinite().all():
                return f"layer {index} of the {who} gives NaN or Inf"
    for who, capture in (("reference", observation.reference), ("model", observation.student)):
        states = capture.hidden
        if states is not None and not states[mask.to(states.device)].isfinite().all():
            return f"the last layer's output (after the final norm) of the {who} holds NaN or Inf"
    return None
