"""The task loss in a plain loop: the model's own loss, scaled so that the losses of a window add up."""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.data.spans import read_spans, without_tags
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import dissect
from safelora_fast.models.distributed import sum_over_ranks, world_size
from safelora_fast.models.reference_pass import evaluation_mode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from safelora_fast.training.loss_terms import Totals

CASTS_INPUTS = {"FSDPModule", "FullyShardedDataParallel"}  # they cast float tensors to the parameters' dtype
SAME_LOSS = 1e-4  # relative; doubling the number of items halves the labels' part, a much larger change


class TaskLoss:
    """The model's own loss of one micro-batch, scaled for gradients that are averaged over processes.

    The model's loss is S/n + E. S is the sum of the labels' negative log-likelihoods, n their number, and E an extra
    term of the model (router loss, AdaLoRA's orthogonality). Consider a window of M micro-batches with N labels on W
    processes. S must be summed and divided by N; E must be averaged over micro-batches and processes.

    - A model that divides by `num_items_in_batch` is passed N/(M·W), and its loss is multiplied by 1/M.
    - A model that divides by the labels of the micro-batch has its loss multiplied by W times its share of the N labels.

    The signature does not show which kind a model is, because many accept `**kwargs` and ignore them. On one process,
    the autograd graph of the first loss shows it. Otherwise, two losses of one batch with different numbers are compared.

    Args:
        model: the model with its wrappers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._divides: bool | None = None

    def decide(self, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """On several processes, determine whether the model divides by `num_items_in_batch`. Collective.

        All processes must run the same passes. This is separate from :meth:`of` because some processes may compute
        their loss in another way and never call that.
        """
        undecided = world_size() > 1 and self._divides is None
        batch = micro_batches[0] if undecided and micro_batches else {}
        if batch.get("labels") is None:
            return
        if not _takes_loss_arguments(self._model):
            self._divides = False
            return
        device = next(self._model.parameters()).device
        batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        vote = _divides_by_items(self._model, batch)
        divides, ignores = sum_over_ranks([float(vote is True), float(vote is False)], device)
        if divides or ignores:
            self._divides = divides > ignores

    def of(self, batch: Mapping[str, Any], totals: Totals) -> torch.Tensor:
        """Return the scaled loss of one micro-batch.

        Args:
            batch: the model's keyword arguments, including labels.
            totals: the window's denominators.

        Raises:
            SettingsError: the model returns no loss.
        """
        model, spans = self._model, read_spans(batch)
        batch = without_tags(batch)
        if self._divides is None and not _takes_loss_arguments(model):
            self._divides = False
        labels = max(totals.labels, 1)
        if self._divides is False:
            loss = _loss(model(**batch))
        else:
            items = _number(model, labels / (totals.micro_batches * world_size()), spans.real.device)
            loss = _loss_with(model, batch, items)
            if self._divides is None and world_size() == 1:
                self._divides = _in_graph(model, loss, items) or _divides_by_items(model, batch)
        share = spans.labels / labels * world_size() if self._divides is False else 1 / totals.micro_batches
        return (loss if spans.labels else torch.nan_to_num(loss)) * share


def _number(model: nn.Module, value: float, device: torch.device) -> torch.Tensor | float:
    """Number of items as a tensor, or as a Python number if FSDP would cast a tensor to half precision.

    The tensor requires a gradient, so that the autograd graph of the loss shows whether it was used.
    """
    if any(kind.__name__ in CASTS_INPUTS for part in model.modules() for kind in type(part).__mro__):
        return value
    return torch.tensor(value, device=device).requires_grad_()


def _in_graph(model: nn.Module, loss: torch.Tensor, leaf: torch.Tensor | float) -> bool:
    """Whether the autograd graph of a loss contains `leaf`. False for compiled models, whose graph does not show it."""
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


def _divides_by_items(model: nn.Module, batch: Mapping[str, Any]) -> bool | None:
    """Whether the model's loss changes with `num_items_in_batch`; None if this batch does not show it."""
    spans, batch = read_spans(batch), without_tags(batch)
    counts = (_number(model, factor * max(spans.labels, 1), spans.real.device) for factor in (1.0, 2.0))
    with torch.no_grad(), evaluation_mode(model), torch.compiler.set_stance("force_eager"):
        once, twice = (float(_loss_with(model, batch, items)) for items in counts)
    if not spans.labels or not math.isfinite(once):
        return None
    return not math.isclose(once, twice, rel_tol=SAME_LOSS)


def _loss_with(model: nn.Module, batch: Mapping[str, Any], items: torch.Tensor | float) -> torch.Tensor:
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
