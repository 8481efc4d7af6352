"""The task's own loss in a plain loop: the model's, scaled so that the losses of a window add up."""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.data.spans import without_tags
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import dissect
from safelora_fast.models.distributed import sum_over_ranks, world_size
from safelora_fast.models.reference_pass import evaluation_mode

if TYPE_CHECKING:
    from torch import nn

    from safelora_fast.data.spans import Spans
    from safelora_fast.training.window import Totals

CASTS_INPUTS = {"FSDPModule", "FullyShardedDataParallel"}  # float tensors, to the parameters' dtype
SAME_LOSS = 1e-4  # relative: twice the number of items halves the labels' part, which is far more than that


class TaskLoss:
    """The model's own loss of one micro-batch, scaled for gradients that are averaged over processes.

    It is S/n + E: the negative log-likelihoods of the labels over their number, and what the model adds by itself (the
    loss of a mixture's routers, AdaLoRA's orthogonality). Over a window of M micro-batches with N labels on W processes S
    must count as one sum over N, and E as a mean over micro-batches and processes. A model that divides by the
    `num_items_in_batch` it is given is told N/(M·W), and 1/M of its loss counts. Another one divides by the labels of the
    micro-batch, and counts as much as it has of the window's labels.

    Which one a model is does not show in its signature: many take `**kwargs` and ignore them. It shows in the graph of its
    first loss, or else in its losses of that batch with two numbers.
    """

    def __init__(self) -> None:
        self._divides: bool | None = None

    def of(self, model: nn.Module, batch: Mapping[str, Any], spans: Spans, totals: Totals) -> torch.Tensor:
        """The loss of one micro-batch.

        Args:
            model: the model with its wrappers.
            batch: what it takes as keyword arguments, labels among them.
            spans: the batch's tokens.
            totals: the window's denominators.

        Raises:
            SettingsError: the model gives no loss.
        """
        batch = without_tags(batch)
        if self._divides is None and not _takes_loss_arguments(model):
            self._divides = False
        labels = max(totals.labels, 1)
        if self._divides is False:
            loss = _loss(model(**batch))
        else:
            items = _number(model, labels / (totals.micro_batches * world_size()), spans)
            loss = _told(model, batch, items)
            if self._divides is None:
                self._divides = _in_graph(model, loss, items) or _divides_by_items(model, batch, spans)
        share = spans.labels / labels * world_size() if self._divides is False else 1 / totals.micro_batches
        return (loss if spans.labels else torch.nan_to_num(loss)) * share


def _number(model: nn.Module, value: float, spans: Spans) -> torch.Tensor | float:
    """A number of items for a model: a tensor, or a Python number where FSDP would round a tensor to half precision.

    The tensor has a gradient, though nobody needs it: so the graph of the loss shows whether it was used.
    """
    if any(kind.__name__ in CASTS_INPUTS for part in model.modules() for kind in type(part).__mro__):
        return value
    return torch.tensor(value, device=spans.real.device).requires_grad_()


def _in_graph(model: nn.Module, loss: torch.Tensor, leaf: torch.Tensor | float) -> bool:
    """Whether a loss was computed from a tensor; compiled code does not show it."""
    if not isinstance(leaf, torch.Tensor) or any(
        getattr(part, "_compiled_call_impl", None) is not None for part in (model, dissect(model).model)
    ):
        return False
    nodes, seen = deque([loss.grad_fn]), set()
    while nodes:
        node = nodes.popleft()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is leaf:
            return True
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
    return False


def _divides_by_items(model: nn.Module, batch: Mapping[str, Any], spans: Spans) -> bool | None:
    """Whether the model's loss changes with `num_items_in_batch`; None where no process can tell: no labels. Collective."""
    counts = (_number(model, factor * max(spans.labels, 1), spans) for factor in (1.0, 2.0))
    with torch.no_grad(), evaluation_mode(model), torch.compiler.set_stance("force_eager"):
        once, twice = (float(_told(model, batch, items)) for items in counts)
    same, telling = math.isclose(once, twice, rel_tol=SAME_LOSS), spans.labels > 0 and math.isfinite(once)
    votes = [float(telling and not same), float(telling and same)]
    divides, ignores = sum_over_ranks(votes, spans.real.device)
    return None if not divides and not ignores else divides > ignores


def _told(model: nn.Module, batch: Mapping[str, Any], items: torch.Tensor | float) -> torch.Tensor:
    return _loss(model(**{"use_cache": False, **batch, "num_items_in_batch": items}))


def _loss(output: Any) -> torch.Tensor:
    loss: torch.Tensor | None = output.get("loss") if isinstance(output, Mapping) else output[0]
    if loss is None or loss.dim() != 0:
        raise SettingsError("the model gives no loss: put labels into the batch, or use regularizer()")
    return loss


def _takes_loss_arguments(model: nn.Module) -> bool:
    inner = dissect(model).model
    accepts = getattr(inner, "accepts_loss_kwargs", None)
    if accepts is not None:
        return bool(accepts)
    parameters = inspect.signature(inner.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
