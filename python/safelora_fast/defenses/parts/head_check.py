"""Checks that the logits of a model are its output head applied to its hidden states.

KL multiplies the hidden states by the head's weight directly. Some models apply a further transform or scale that the
known configuration keys do not show. KL would then be wrong, so the model is run once and its logits are compared.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.data.spans import without_tags
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import is_parallel
from safelora_fast.models.capture import Tap
from safelora_fast.models.reference_pass import evaluation_mode
from safelora_fast.ops.linear_kl import Head as LogitHead

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from safelora_fast.models.anatomy import Anatomy, Head

logger = logging.getLogger(__name__)

PROBE_TOKENS = 8
SOURCES = ("input_ids", "inputs_embeds")


def check_logits(model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any]) -> None:
    """Run the model on a few tokens of a batch, and compare its logits with the head applied to its hidden states.

    If the model fails on token ids alone, it is run on the whole batch. If that fails too, a warning is logged and
    nothing is compared.

    Args:
        model: the model with its wrappers. FSDP2 gathers weights only if the outermost module is called.
        anatomy: parts of the model.
        batch: a training batch.

    Raises:
        SettingsError: the logits differ by more than rounding, or are not finite in the same places.
    """
    name = next((name for name in SOURCES if batch.get(name) is not None), None)
    if name is None:
        return
    kind = type(anatomy.model).__name__
    whole = {key: value for key, value in without_tags(batch).items() if key not in {"labels", "shift_labels"}}
    try:
        try:
            theirs, ours = _logits(model, anatomy, {name: batch[name][:1, :PROBE_TOKENS]})
        except Exception:  # model code may raise anything
            theirs, ours = _logits(model, anatomy, whole)
    except Exception as error:
        logger.warning(
            "KL: the head of %s could not be compared with its logits (%s: %s)", kind, type(error).__name__, error
        )
        return
    if theirs.shape != ours.shape or not _close(ours, theirs):
        shapes = "" if theirs.shape == ours.shape else f" (shapes {tuple(theirs.shape)} and {tuple(ours.shape)})"
        raise SettingsError(
            f"KL: the logits of {kind} are not its head on the decoder's hidden states{shapes}, so the divergence would be "
            "that of another model; use FeatureDistance"
        )


def _logits(model: nn.Module, anatomy: Anatomy, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the first tokens of the first row: from the model itself, and from the head on its hidden states."""
    head = anatomy.head()
    while is_parallel(model):
        model = model.module
    tap = Tap(anatomy, [])
    tap.attach()
    try:
        with torch.no_grad(), evaluation_mode(model), torch.compiler.set_stance("force_eager"):
            capture = tap.begin()
            theirs = model(**{**inputs, "use_cache": False})["logits"][:1, :PROBE_TOKENS]
            assert capture.hidden is not None  # noqa: S101
            with capture.autocast_again():
                weight, bias = head.parameters()
                hidden = capture.hidden[:1, :PROBE_TOKENS].to(weight.dtype)
                return theirs, LogitHead(weight, bias, head.scale, head.softcap).logits(hidden)
    finally:
        tap.detach()


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two sets of logits differ by rounding only; NaN and Inf must be in the same places."""
    exact = ours.dtype == theirs.dtype and ours.dtype in {torch.float32, torch.float64}
    ours, theirs = ours.double(), theirs.double()
    apart = torch.where((ours == theirs) | (ours.isnan() & theirs.isnan()), 0.0, ours - theirs)
    size = torch.where(theirs.isfinite(), theirs, 0.0).norm()
    return bool(apart.isfinite().all() and apart.norm() <= (1e-4 if exact else 3e-2) * size)


def check_same_head(own: Anatomy, other: Anatomy) -> None:
    """Raise SettingsError if the two heads differ in weight, bias, scale or soft-cap: KL uses one head for both models."""
    mine, theirs = own.head(), other.head()
    if mine.module is not theirs.module and not _same(mine, theirs):
        raise SettingsError(
            "KL: the output head of the model given as reference is not that of the model in training, and the divergence "
            "needs one head for both: give a copy of the model before fine-tuning"
        )


def _same(mine: Head, theirs: Head) -> bool:
    if (mine.scale, mine.softcap) != (theirs.scale, theirs.softcap):
        return False
    for left, right in zip(mine.parameters(), theirs.parameters(), strict=True):
        if left is None or right is None:
            if left is not right:
                return False
        elif left.shape != right.shape or not torch.equal(left, right.to(left)):
            return False
    return True
