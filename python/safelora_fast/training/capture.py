"""Capture of block outputs and of the decoder's last hidden state, by module hooks."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from safelora_fast.training.anatomy import Anatomy


@dataclass
class Capture:
    """Hidden states [batch, tokens, hidden] of one forward pass: block outputs by index, and the decoder's output.

    Attributes:
        blocks: outputs of blocks.
        hidden: the decoder's output, after its final norm.
        autocast: the dtype that autocast had at the decoder's end, None where it was off.
    """

    blocks: dict[int, torch.Tensor] = field(default_factory=dict)
    hidden: torch.Tensor | None = None
    autocast: torch.dtype | None = None

    def autocast_again(self) -> AbstractContextManager[Any]:
        """Autocast as the output head had it: trainers switch it on inside the model's forward only."""
        assert self.hidden is not None  # noqa: S101
        kind, dtype = self.hidden.device.type, self.autocast
        again: AbstractContextManager[Any] = torch.autocast(kind, dtype=dtype, enabled=dtype is not None)
        return again


def first_tensor(output: Any) -> torch.Tensor:
    """The hidden states among what a block or decoder returns (a tensor, a tuple, or a model output)."""
    if isinstance(output, torch.Tensor):
        return output
    hidden = getattr(output, "last_hidden_state", None)
    return output[0] if hidden is None else hidden


class Tap:
    """Hooks on the blocks and on the decoder of one model; they record only between `begin` and the decoder's end.

    A block's hook fires again when gradient checkpointing recomputes it in backward: nothing is open then, so that
    firing is ignored. With re-entrant checkpointing a block may run without gradients; the recorded tensor is the one
    that checkpointing returns, and it receives its gradient function when the block is left.
    """

    def __init__(self, anatomy: Anatomy, blocks: Iterable[int]) -> None:
        self.anatomy = anatomy
        self.indices = sorted(set(blocks))
        self._open: Capture | None = None
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Install the hooks."""
        for index in self.indices:
            self._handles.append(self.anatomy.blocks[index].register_forward_hook(self._block_hook(index)))
        self._handles.append(self.anatomy.decoder.register_forward_hook(self._decoder_hook))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._open = None

    def begin(self) -> Capture:
        """Open a capture; it closes itself when the decoder returns."""
        self._open = Capture()
        return self._open

    def close(self) -> None:
        """Drop an open capture, after a forward pass that failed."""
        self._open = None

    def _block_hook(self, index: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if self._open is not None:
                self._open.blocks[index] = first_tensor(output)

        return hook

    def _decoder_hook(self, _module: Any, _inputs: Any, output: Any) -> None:
        if self._open is not None:
            hidden = first_tensor(output)
            kind = hidden.device.type
            self._open.hidden = hidden
            self._open.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            self._open = None


class StudentRecorder:
    """Records the one training forward pass inside `recording()`, and runs the reference pass on the same inputs.

    The reference pass starts in the decoder's pre-hook: it sees exactly what the student's decoder is given
    (token ids or embeddings, mask, positions), under the same autocast, and before the student spends memory.
    """

    def __init__(self, tap: Tap, reference: Callable[[tuple[Any, ...], Mapping[str, Any]], Capture] | None) -> None:
        self._tap = tap
        self._run_reference = reference
        self._armed = False
        self._inside = False
        self._handles: list[Any] = []
        self.student: Capture | None = None
        self.reference: Capture | None = None

    def attach(self) -> None:
        """Install the hooks."""
        self._tap.attach()
        hook = self._tap.anatomy.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        self._handles.append(hook)

    def detach(self) -> None:
        """Remove the hooks and forget what was recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tap.detach()
        self.forget()

    def forget(self) -> None:
        """Drop recorded tensors, so that their memory is free before backward."""
        self.student = self.reference = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward pass with gradients that happens inside.

        Raises:
            SettingsError: no such pass happened inside, or more than one.
        """
        self.forget()
        self._armed = True
        try:
            yield
        finally:
            self._armed = False
            self._tap.close()
        if self.student is None or self.student.hidden is None:
            raise SettingsError(
                "the defences saw no training forward pass of the model: it must run uncompiled, with gradients, "
                "and through the model that was given"
            )

    def _before_decoder(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._armed or self._inside or not torch.is_grad_enabled():
            return
        if self.student is not None:
            raise SettingsError("the model ran forward twice in one loss: defences need one training pass a loss")
        if self._run_reference is not None:
            self._inside = True
            try:
                self.reference = self._run_reference(args, kwargs)
            finally:
                self._inside = False
        self.student = self._tap.begin()
