"""Capturing layer outputs and the decoder's last hidden state with module hooks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from safelora_fast.data.batch_part import Part
    from safelora_fast.models.anatomy import Anatomy

    Pick = tuple[nn.Module, Callable[[Any], torch.Tensor]]


class _Alone(threading.local):
    """The taps of the reference passes running in this thread, innermost last."""

    def __init__(self) -> None:
        self.taps: list[Tap] = []


_alone = _Alone()


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (argument name, tensor) for every tensor, including those in lists and mappings."""
        named = {**{f"argument {index}": value for index, value in enumerate(self.args)}, **self.kwargs}
        for name, value in named.items():
            yield from ((name, tensor) for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)


@dataclass
class Capture:
    """Hidden states [batch, tokens, hidden] of one forward pass.

    Attributes:
        layers: layer outputs by index.
        hidden: the decoder's output, after its final norm.
        autocast: the autocast dtype when the decoder returned; None if autocast was off.
        part: the part of the batch that ran; None if the whole batch did.
        picked: what was picked from the outputs of other modules, by name (see :class:`Tap`).
    """

    layers: dict[int, torch.Tensor] = field(default_factory=dict)
    hidden: torch.Tensor | None = None
    autocast: torch.dtype | None = None
    part: Part | None = None
    picked: dict[str, torch.Tensor] = field(default_factory=dict)

    def of_part(self, part: Part, layers: Iterable[int]) -> Capture:
        """Return the hidden states of a part of the batch, with these layers only."""
        hidden = None if self.hidden is None else part.take(self.hidden)
        return Capture({index: part.take(self.layers[index]) for index in layers}, hidden, self.autocast, part)

    def autocast_again(self) -> AbstractContextManager[Any]:
        """Return a context with the output head's autocast: trainers enable it only inside the model's forward."""
        assert self.hidden is not None  # noqa: S101
        kind, dtype = self.hidden.device.type, self.autocast
        again: AbstractContextManager[Any] = torch.autocast(kind, dtype=dtype, enabled=dtype is not None)
        return again


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Return the autocast dtype of a kind of device; None if autocast is off."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def first_tensor(output: Any) -> torch.Tensor:
    """Return the hidden states from the output of a layer or decoder (a tensor, a tuple, or a model output)."""
    if isinstance(output, torch.Tensor):
        return output
    hidden = getattr(output, "last_hidden_state", None)
    return output[0] if hidden is None else hidden


def layer_states(output: Any) -> torch.Tensor:
    """Return the hidden states [batch, tokens, hidden] from the output of a layer.

    Raises:
        SettingsError: they do not have three dimensions.
    """
    states = first_tensor(output)
    if states.dim() != 3:
        raise SettingsError(
            f"a layer gave hidden states of shape {tuple(states.shape)}, not [batch, tokens, hidden]: defenses, monitors "
            "and persona vectors that look at layers are not defined for this model"
        )
    return states


class Tap:
    """Hooks on a model's layers and decoder, which record only from `begin` until the decoder returns.

    Gradient checkpointing runs layers again in backward. No capture is open then, so these calls are ignored.
    Re-entrant checkpointing may run a layer without gradients. The recorded tensor is the one that checkpointing
    returns, and it gets its gradient function when the layer returns. What is picked inside of a layer never gets one.
    """

    def __init__(self, anatomy: Anatomy, layers: Iterable[int]) -> None:
        self.anatomy = anatomy
        self.indices = sorted(set(layers))
        self._open: Capture | None = None
        self._handles: list[Any] = []

    def attach(self, picks: Mapping[str, Pick] | None = None) -> None:
        """Install the hooks.

        Args:
            picks: for each name in `Capture.picked`, a module and a function from its output to the tensor to keep.
        """
        for index in self.indices:
            self._handles.append(self.anatomy.layers[index].register_forward_hook(self._layer_hook(index)))
        for name, (module, pick) in (picks or {}).items():
            self._handles.append(module.register_forward_hook(self._pick_hook(name, pick)))
        self._handles.append(self.anatomy.decoder.register_forward_hook(self._decoder_hook))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._open = None

    def begin(self) -> Capture:
        """Open a capture, which closes when the decoder returns."""
        self._open = Capture()
        return self._open

    @contextmanager
    def alone(self) -> Iterator[Capture]:
        """Open a capture and pause all other taps, so that a nested pass does not reach the outer taps."""
        _alone.taps.append(self)
        try:
            yield self.begin()
        finally:
            _alone.taps.pop()
            self.close()

    @property
    def _recording(self) -> Capture | None:
        return self._open if not _alone.taps or _alone.taps[-1] is self else None

    def close(self) -> None:
        """Drop an open capture after a failed forward pass."""
        self._open = None

    def _layer_hook(self, index: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if (capture := self._recording) is not None:
                capture.layers[index] = layer_states(output)

        return hook

    def _pick_hook(self, name: str, pick: Callable[[Any], torch.Tensor]) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if (capture := self._recording) is not None:
                # Checkpointing counts the tensors that a layer saves, and its second run of the layer picks nothing.
                with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
                    capture.picked[name] = pick(output)

        return hook

    def _decoder_hook(self, _module: Any, _inputs: Any, output: Any) -> None:
        if (capture := self._recording) is not None:
            hidden = first_tensor(output)
            capture.hidden = hidden
            capture.autocast = autocast_dtype(hidden.device.type)
            self._open = None


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class StudentRecorder:
    """Records the training forward pass inside `recording()`, and runs the reference pass on the same inputs.

    The reference pass starts in the decoder's pre-hook: under the student's autocast, and before the decoder allocates
    memory.

    Args:
        tap: the hooks that record the student.
        run_reference: called with the call of the whole model (None if only the decoder was called) and the decoder's
            call; None for no reference pass. It returns None for a batch that needs none.
        entrances: modules that are called with the whole model's arguments (see :func:`entrances`).
    """

    def __init__(
        self,
        tap: Tap,
        run_reference: Callable[[Call | None, Call], Capture | None] | None,
        entrances: Iterable[nn.Module] = (),
    ) -> None:
        self._tap = tap
        self._run_reference = run_reference
        self._entrances = list(entrances)
        self._whole: Call | None = None
        self._armed = False
        self._handles: list[Any] = []
        self.student: Capture | None = None
        self.reference: Capture | None = None

    def attach(self, picks: Mapping[str, Pick] | None = None) -> None:
        """Install the hooks."""
        self._tap.attach(picks)
        for module in self._entrances:
            self._handles.append(module.register_forward_pre_hook(self._before_model, with_kwargs=True))
        hook = self._tap.anatomy.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        self._handles.append(hook)

    def detach(self) -> None:
        """Remove the hooks and drop the recorded tensors."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tap.detach()
        self.forget()

    def forget(self) -> None:
        """Drop the recorded tensors, to free memory before backward."""
        self.student = self.reference = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward pass with gradients that runs inside this context.

        Raises:
            SettingsError: no such pass ran, or more than one.
        """
        self.forget()
        self._armed = True
        try:
            yield
        finally:
            self._armed = False
            self._whole = None
            self._tap.close()
        if self.student is None or self.student.hidden is None:
            raise SettingsError(
                "the defenses saw no training forward pass of the model: it must run uncompiled, with gradients, "
                "and through the model that was given"
            )

    @property
    def _training_pass(self) -> bool:
        return self._armed and not _alone.taps and torch.is_grad_enabled()

    def _before_model(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._training_pass:
            self._whole = Call(args, kwargs)

    def _before_decoder(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._training_pass:
            return
        if self.student is not None:
            raise SettingsError("the model ran forward twice in one loss: defenses need one training pass per loss")
        whole, self._whole = self._whole, None
        if self._run_reference is not None:
            self.reference = self._run_reference(whole, Call(args, kwargs))
        self.student = self._tap.begin()
