"""The task's own loss in a plain loop: the model's, scaled so that the losses of a window add up."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.errors import SettingsError
from safelora_fast.training.anatomy import dissect
from safelora_fast.training.batch import without_tags
from safelora_fast.training.distributed import world_size

if TYPE_CHECKING:
    from torch import nn

    from safelora_fast.training.batch import Spans
    from safelora_fast.training.totals import Totals


def task_loss(model: nn.Module, batch: Mapping[str, Any], spans: Spans, totals: Totals) -> torch.Tensor:
    """The model's loss of one micro-batch as a mean over the labels of the whole window, for gradients averaged over processes.

    Args:
        model: the model with its wrappers.
        batch: what it takes as keyword arguments, labels among them.
        spans: the batch's tokens.
        totals: the window's denominators.

    Raises:
        SettingsError: the model gives no loss.
    """
    batch = without_tags(batch)
    if _takes_loss_arguments(model):
        items = torch.tensor(max(totals.labels, 1), device=spans.real.device)
        output = model(**{"use_cache": False, **batch, "num_items_in_batch": items})
        share = 1.0
    else:
        output = model(**batch)
        share = spans.labels / max(totals.labels, 1)
    loss: torch.Tensor | None = output.get("loss") if isinstance(output, Mapping) else output[0]
    if loss is None or loss.dim() != 0:
        raise SettingsError("the model gives no loss: put labels into the batch, or use regularizer()")
    if share == 0:
        loss = torch.nan_to_num(loss) * 0
    return loss * (share * world_size())


def _takes_loss_arguments(model: nn.Module) -> bool:
    inner = dissect(model).model
    accepts = getattr(inner, "accepts_loss_kwargs", None)
    if accepts is not None:
        return bool(accepts)
    parameters = inspect.signature(inner.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
