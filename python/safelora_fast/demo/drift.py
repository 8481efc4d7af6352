"""How far a model has moved from its reference: loss and divergence on answers, in plain torch and float32.

Nothing here touches a defence, so that the measure does not depend on what is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from safelora_fast.demo.text import Example


@dataclass(frozen=True)
class Answer:
    """Sums over the tokens of one answer, its end among them, in nats.

    Attributes:
        tokens: how many.
        loss: negative log-likelihood.
        divergence: KL(model ‖ reference) over the whole vocabulary.
    """

    tokens: int
    loss: float
    divergence: float


def predictions(model: torch.nn.Module, example: Example) -> torch.Tensor:
    """Log-probabilities of each token of the answer, given what comes before: [answer tokens, vocabulary], float32."""
    model.eval()
    with torch.inference_mode():
        logits = model(torch.tensor([example.ids])).logits[0, example.start - 1 : -1]
    return logits.float().log_softmax(-1)


def judge(own: torch.Tensor, reference: torch.Tensor, example: Example) -> Answer:
    """Compare a model's predictions of an answer with the answer, and with the reference's predictions."""
    target = torch.tensor(example.ids[example.start :])
    loss = -own.gather(-1, target[:, None]).sum(dtype=torch.float64)
    divergence = (own.exp() * (own - reference)).sum(dtype=torch.float64)
    return Answer(len(target), float(loss), float(divergence))


def weaken(model: torch.nn.Module, share: float) -> None:
    """Scale the update of a LoRA model, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.mul_(share)
