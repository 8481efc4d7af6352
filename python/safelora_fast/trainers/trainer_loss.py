"""The task loss of the transformers and TRL trainers: whether it is plain cross-entropy, label weights, TRL's metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from safelora_fast.data.spans import read_spans
from safelora_fast.data.tokens import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from safelora_fast.ops.linear_kl import TokenFigures

SFT_MODULE = "trl.trainer.sft_trainer"


def why_apart(trainer: Any, owner: type) -> str | None:
    """Return why the trainer's loss may not be the plain cross-entropy of the labels; None if it is.

    Args:
        trainer: the trainer.
        owner: the class whose `compute_loss` computes the task loss.
    """
    reason = None
    if trainer.label_smoother is not None:
        reason = "labels are smoothed"
    elif trainer.compute_loss_func is not None:
        reason = "compute_loss_func makes the loss"
    elif reports_figures(owner):
        if not _fuses_head():
            reason = "this version of TRL reads the logits for its metrics"
        elif trainer.args.loss_type != "nll":
            reason = f"loss_type is {trainer.args.loss_type}"
    elif owner is not Trainer:
        reason = f"{owner.__name__} has a compute_loss of its own"
    return reason


def reports_figures(owner: type) -> bool:
    """Whether the trainer needs the values of every token for its log."""
    return owner.__module__ == SFT_MODULE


class _OneLabel:
    """A stub model whose loss is that of one label with a negative log-likelihood of 1."""

    training = True

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self._inputs = inputs

    def __call__(self, **arguments: Any) -> dict[str, torch.Tensor]:
        count = arguments.get("num_items_in_batch")
        count = read_spans(self._inputs).labels if count is None else count
        return {"loss": torch.ones((), device=self._inputs["labels"].device) / count}


def label_weight(trainer: Any, owner: type[Trainer], inputs: Mapping[str, Any], items: Any) -> torch.Tensor:
    """Return the weight of one label in the trainer's loss, by calling `compute_loss` with a stub model of NLL 1.

    Args:
        trainer: the trainer.
        owner: the class whose `compute_loss` is called.
        inputs: the micro-batch.
        items: labels of the whole optimizer step, if the trainer counts them.
    """
    model = _OneLabel(inputs)
    weight: torch.Tensor = owner.compute_loss(trainer, model, dict(inputs), num_items_in_batch=items)
    return weight


def report(
    compute_loss: Callable[..., torch.Tensor], tokens: TokenFigures, inputs: Mapping[str, Any], items: Any
) -> torch.Tensor:
    """Record TRL's metrics by calling its `compute_loss` with precomputed values. Return its loss, without gradient."""
    labels = read_spans(inputs).next_labels
    assert labels is not None  # noqa: S101
    labeled = labels.to(tokens.nll.device) != IGNORED_LABEL
    # TRL drops the last position when it shifts the labels itself.
    positions = slice(None) if inputs.get("shift_labels") is not None else slice(None, -1)

    def fused_head(**_arguments: Any) -> SimpleNamespace:
        return SimpleNamespace(
            log_probs=-tokens.nll[:, positions],
            entropy=tokens.entropy[:, positions],
            is_top1=tokens.is_top1[:, positions],
            label_mask=labeled[:, positions],
        )

    return compute_loss(fused_head, inputs, num_items_in_batch=items)


def _fuses_head() -> bool:
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        return False
    return callable(add_fused_lm_head)
