"""The task loss split by source (task examples, safe examples) for the log, if the trainer provides the loss per token."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.data.spans import read_spans
from safelora_fast.data.tokens import IGNORED_LABEL
from safelora_fast.training.metrics import Sums

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from safelora_fast.data.spans import Spans

SOURCES = ("task", "safe")


class SourceLosses:
    """Sums negative log-likelihoods of labels by source. Sums stay on the device until `read()`."""

    def __init__(self) -> None:
        self._losses, self._labels = Sums(), Sums()

    @contextmanager
    def watching(self, model: nn.Module, batch: Mapping[str, Any]) -> Iterator[None]:
        """Add the micro-batch of the training pass that runs inside, if its output has `log_probs` of the labels.

        The fused head of newer TRL versions returns them. Otherwise nothing is added, because the logits of every token
        would be needed.
        """
        found: list[torch.Tensor] = []

        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            log_probs = getattr(output, "log_probs", None)
            if log_probs is not None and torch.is_grad_enabled():
                found.append(log_probs.detach())

        handle = model.register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()
        if found:
            self.add(read_spans(batch), -found[-1])

    def add(self, spans: Spans, nll: torch.Tensor) -> None:
        """Add a micro-batch.

        Args:
            spans: its tokens, with tags and labels.
            nll: negative log-likelihood of each position's next token [batch, positions]; the last position is optional.
        """
        if spans.safe is None or spans.next_labels is None:
            return
        width = nll.shape[1]
        labeled = (spans.next_labels[:, :width] != IGNORED_LABEL).to(nll.device)
        safe = spans.safe[:, :width].to(nll.device)
        for source, part in zip(SOURCES, (labeled & ~safe, labeled & safe), strict=True):
            self._losses.add(source, torch.where(part, nll.detach().double(), 0).sum())
            self._labels.add(source, part.sum())

    def read(self) -> dict[str, float]:
        """Return the mean loss per label by source since the last call, over all processes. Collective."""
        losses, labels = self._losses.read(SOURCES), self._labels.read(SOURCES)
        return {f"loss/{source}": losses[source] / labels[source] for source in SOURCES if labels[source]}
