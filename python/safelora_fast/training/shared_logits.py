"""Task cross-entropy from a defense's logits: when it equals the model's own loss, and a forward pass without logits."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.data.spans import read_spans, without_tags
from safelora_fast.data.tokens import IGNORED_LABEL
from safelora_fast.defenses.base import Observation
from safelora_fast.models.capture import Tap
from safelora_fast.models.reference_pass import evaluation_mode

if TYPE_CHECKING:
    from torch import nn

    from safelora_fast.defenses.base import SharesLogits
    from safelora_fast.models.anatomy import Anatomy
    from safelora_fast.models.capture import Capture

logger = logging.getLogger(__name__)

PROBE_TOKENS = 24
ROUTER_LOSS = "output_router_logits"
KEPT_LOGITS = "logits_to_keep"


class SharedLogits:
    """Decides for each batch whether a defense can compute the task loss, because that is the plain cross-entropy.

    It checks the model's loss function, router losses, and the keys of the batch. It also runs the model once on a few
    tokens: the model's own loss must match, and `logits_to_keep` must be able to turn off its logits.

    Args:
        anatomy: parts of the model in training.
        defense: the defense that shares its logits, if any.
        wanted: False to always compute the losses separately.
    """

    def __init__(self, anatomy: Anatomy, defense: SharesLogits | None, *, wanted: bool) -> None:
        self._anatomy = anatomy
        self._defense = defense
        self._wanted = wanted
        self._told: set[str] = set()
        self._asked = False
        self._of_model: str | None = None

    def allowed(self, model: nn.Module, batch: Mapping[str, Any], *, unless: str | None = None) -> bool:
        """Whether to share logits for this batch. Each reason not to is logged once.

        Args:
            model: the model with its wrappers, as the training pass will call it.
            batch: keyword arguments of that call.
            unless: the caller's own reason not to share.
        """
        if not self._wanted or self._defense is None:
            return False
        reason = unless or self._against_model(model, batch, self._defense) or _against_batch(batch)
        if reason is not None and reason not in self._told:
            self._told.add(reason)
            logger.info(
                "%s makes logits of its own beside those of the task's loss: %s", type(self._defense).__name__, reason
            )
        return reason is None

    def _against_model(self, model: nn.Module, batch: Mapping[str, Any], defense: SharesLogits) -> str | None:
        if not self._asked and batch.get("input_ids") is not None and batch["input_ids"].shape[1] < 2:
            return "the first batch has rows of one token"
        if not self._asked:
            self._of_model = _against_class(self._anatomy) or self._against_answer(model, batch, defense)
            self._asked = True
        return self._of_model

    def _against_answer(self, model: nn.Module, batch: Mapping[str, Any], defense: SharesLogits) -> str | None:
        """Compare the model's own loss on a few tokens of the batch with the shared one."""
        ids = batch.get("input_ids")
        if ids is None:
            return "the batch has no input_ids to try the model with"
        ids = ids[:1, :PROBE_TOKENS]
        labels = ids.clone()
        labels[:, : ids.shape[1] // 4] = IGNORED_LABEL
        question = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "use_cache": False}
        tap = Tap(self._anatomy, [])
        tap.attach()
        try:
            with torch.no_grad(), evaluation_mode(model), torch.compiler.set_stance("force_eager"):
                theirs = _field(model(**question), "loss")
                capture = tap.begin()
                logits = forward_without_logits(model, question)
        except Exception as error:  # model code may raise anything; the losses are then computed separately
            return f"the model gives no loss of a few tokens ({type(error).__name__}: {error})"
        finally:
            tap.detach()
        if logits is not None and logits.numel():
            return f"the model computes logits that {KEPT_LOGITS} excludes"
        assert capture.hidden is not None  # noqa: S101
        spans = read_spans(question)
        spans = replace(spans, safe=spans.real)
        observation = Observation(self._anatomy, capture, capture, spans)
        shared = defense.with_cross_entropy(observation, weight=0.0, cross_entropy_weight=1.0)
        ours = shared.cross_entropy / spans.labels
        exact = capture.hidden.dtype in {torch.float32, torch.float64} and capture.autocast is None
        if not torch.isclose(ours, theirs.to(ours), rtol=1e-5 if exact else 5e-3, atol=0.0):
            return f"the model's own loss is not the plain cross-entropy ({theirs.item():.6g}, not {ours.item():.6g})"
        return None


def forward_without_logits(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Run the model without computing logits, so that its hidden states can be recorded. Return the empty logits.

    The empty logits have a gradient function. Add their sum, zero, to the loss, so that wrappers that track the model's
    output (such as DDP) see that it was used.
    """
    inputs = {name: value for name, value in without_tags(batch).items() if name not in {"labels", "shift_labels"}}
    source = inputs.get("input_ids")
    source = inputs["inputs_embeds"] if source is None else source
    none = torch.zeros(0, dtype=torch.long, device=source.device)
    return _field(model(**{"use_cache": False, **inputs, KEPT_LOGITS: none}), "logits")


def hidden_states(model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any]) -> tuple[Capture, torch.Tensor]:
    """Run the model without its head; return the capture, and the states [batch, tokens, hidden] after the final norm."""
    tap = Tap(anatomy, [])
    tap.attach()
    try:
        capture = tap.begin()
        forward_without_logits(model, batch)
    finally:
        tap.detach()
    assert capture.hidden is not None  # noqa: S101
    return capture, capture.hidden


def _field(output: Any, name: str) -> Any:
    return output[name] if isinstance(output, Mapping) else output[0]


def _against_class(anatomy: Anatomy) -> str | None:
    """A reason not to share, from the model's class and configuration."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    model = anatomy.model
    kind = type(model).__name__
    if KEPT_LOGITS not in inspect.signature(model.forward).parameters:
        return f"{kind} takes no {KEPT_LOGITS}"
    if model.config is not anatomy.config:
        return f"{kind} is multimodal"
    if getattr(model, "loss_function", None) is not ForCausalLMLoss:
        return f"{kind} has a loss function of its own"
    if getattr(anatomy.config, ROUTER_LOSS, False):
        return f"{kind} adds the loss of its routers"
    return None


def _against_batch(batch: Mapping[str, Any]) -> str | None:
    """A reason not to share, from the keys of the batch."""
    if batch.get("labels") is None:
        return "the batch has no labels"
    for name in (KEPT_LOGITS, ROUTER_LOSS, "ignore_index", "num_items_in_batch"):
        if batch.get(name) is not None:
            return f"the batch sets {name}"
    return None
