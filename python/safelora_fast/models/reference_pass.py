"""The reference pass: the model as it was before fine-tuning, run on the student's inputs without gradients."""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import Anatomy, above, adapter_layers
from safelora_fast.models.capture import Call, Capture, Tap
from safelora_fast.models.reference_checks import (
    adapter_names,
    check_base_reference,
    check_inputs,
    check_named_reference,
    check_second_model,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

Reference: TypeAlias = "str | nn.Module"
CACHES = ("past_key_values", "cache")  # before and from transformers 5.24


class ReferencePass:
    """Runs the reference and leaves the model as it was: mode, adapters, `requires_grad` and random state.

    The reference is the whole model before fine-tuning, given the inputs of the whole model in training. Where its
    decoder is handed these inputs as they came, as in models of text alone, only the decoder is run. Where tensors were
    made on the way (embeddings of images and text, position ids), the reference makes its own, up to the decoder's end.

    It runs in evaluation mode, with the running statistics that it had at first: neither dropout, nor the noise of NEFTune,
    nor what training does to a BatchNorm reaches it. The modules that contain the decoder
    get the student's mode, because some models choose their attention mask by it (PaliGemma, Gemma 3).

    Args:
        model: the model in training, with its PEFT wrapper.
        anatomy: its parts.
        reference: "base" for the same model with its adapters disabled, the name of a frozen adapter of the model, or
            a second model.
        blocks: the blocks to capture.

    Raises:
        SettingsError: disabling the adapters would not give the original model, or the adapter does not exist.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, reference: Reference, blocks: list[int]) -> None:
        self._layers = [layer for _, layer in adapter_layers(anatomy.model)]
        self._student = anatomy.model
        self._own = isinstance(reference, str)
        if isinstance(reference, str):
            check_base_reference(model) if reference == "base" else check_named_reference(model, reference)
            self.anatomy = anatomy
        else:
            self.anatomy = check_second_model(anatomy, reference)
        self._reference = reference
        self._above = above(self.anatomy.model, self.anatomy.decoder)
        self._statistics = [
            (module, name, getattr(module, name).detach().clone())
            for module in self.anatomy.model.modules()
            for name in ("running_mean", "running_var")
            if isinstance(getattr(module, name, None), torch.Tensor)
        ]
        self.tap = Tap(self.anatomy, blocks)

    def run(self, whole: Call | None, decoder: Call, *, around: Callable[[], Any]) -> Capture:
        """Run the reference on the inputs of the student's pass.

        Args:
            whole: what the whole model in training was called with; None where only its decoder was called.
            decoder: what its decoder was called with.
            around: makes a context to run in (steering is applied to the reference too).

        Raises:
            SettingsError: a cache is among the inputs, or a tensor that depends on what is trained.
        """
        if _has_cache(decoder if whole is None else whole):
            raise SettingsError("a key-value cache was given to the training pass: set use_cache=False")
        if whole is None:
            check_inputs(decoder)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_uncached_autocast(self._device()))
            stack.enter_context(torch.random.fork_rng(devices=self._cuda_devices()))
            mode = self._student.training  # a second model is in evaluation mode, mostly
            stack.enter_context(evaluation_mode(self.anatomy.model, besides=self._above, training=mode))
            if self._reference == "base":
                stack.enter_context(adapters_disabled(self._layers))
            elif self._own:
                stack.enter_context(adapter_active(self._layers, str(self._reference)))
            stack.enter_context(_buffers_as(self._statistics))
            stack.enter_context(around())
            capture = stack.enter_context(self.tap.alone())
            if whole is None or (_handed_on(whole, decoder) and not self._sharded()):
                self.anatomy.decoder(*decoder.args, **decoder.kwargs)
            else:
                self._run_whole(whole)
        return capture

    def _run_whole(self, call: Call) -> None:
        """Run the reference from the inputs of the whole model, and leave it at its decoder's end: no head, no loss.

        The model in training is already inside its own call: hooks on it, such as those of FSDP2, must not run again.
        Outputs that transformers 4.57 records by patching modules are not asked for: it would leave the patches there.
        """
        model = self.anatomy.model
        args, kwargs = (call.args, call.kwargs) if type(model) is type(self._student) else ((), self._named(call))
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith("output_")}
        handle = self.anatomy.decoder.register_forward_hook(_leave)
        try:
            (model.forward if self._own else model)(*args, **kwargs)
        except _DecoderDone:
            return
        finally:
            handle.remove()
        raise SettingsError(
            f"the reference ({type(model).__name__}) did not run its decoder on the inputs of the model"
        )

    def _named(self, call: Call) -> dict[str, Any]:
        """The arguments by the names that the model in training has for them.

        Raises:
            SettingsError: the reference does not take one of them, and would be run without it.
        """
        takes = inspect.signature(self._student.forward).parameters
        arguments = {**dict(zip(takes, call.args, strict=False)), **call.kwargs}
        other = self.anatomy.model
        lacking = takes.keys() - inspect.signature(other.forward).parameters.keys()
        if missed := [name for name in sorted(lacking) if arguments.get(name) is not None]:
            raise SettingsError(
                f"the model given as reference ({type(other).__name__}) does not take {', '.join(missed)}, which the "
                f"{type(self._student).__name__} in training is given: give a frozen copy of the model before fine-tuning"
            )
        return arguments

    def _sharded(self) -> bool:
        """Whether FSDP2 gathers the embeddings of a second model, which it does where the whole model is called."""
        return not self._own and any(hasattr(p, "full_tensor") for p in self.anatomy.decoder.parameters())

    def _device(self) -> torch.device:
        return next(self.anatomy.decoder.parameters()).device

    def _cuda_devices(self) -> list[int]:
        devices = {parameter.device for parameter in self.anatomy.model.parameters()}
        return sorted({device.index or 0 for device in devices if device.type == "cuda"})


@contextmanager
def _buffers_as(values: list[tuple[nn.Module, str, torch.Tensor]]) -> Iterator[None]:
    """Give buffers the values that they had: training moves the running statistics of a BatchNorm, frozen or not."""
    now = [(module, name, getattr(module, name)) for module, name, _ in values]
    try:
        for (module, name, value), (*_, current) in zip(values, now, strict=True):
            setattr(module, name, value.to(current))
        yield
    finally:
        for module, name, current in now:
            setattr(module, name, current)


class _DecoderDone(BaseException):
    """Ends a pass that is only run for its decoder's hidden states."""


def _leave(*_: Any) -> None:
    raise _DecoderDone


def _has_cache(call: Call) -> bool:
    return any(call.kwargs.get(name) is not None for name in CACHES)


def _handed_on(whole: Call, decoder: Call) -> bool:
    """Whether every tensor that the decoder was given is an input of the whole model: nothing was computed on the way."""
    given = {id(tensor) for _, tensor in whole.tensors()}
    return not _has_cache(decoder) and all(id(tensor) in given for _, tensor in decoder.tensors())


@contextmanager
def evaluation_mode(module: nn.Module, *, besides: Collection[nn.Module] = (), training: bool = True) -> Iterator[None]:
    """Put a module in evaluation mode, those in `besides` in that of `training`, and then all back in the mode they had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    for part in besides:
        part.training = training
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _gradient_flags_kept(layers: list[nn.Module]) -> Iterator[Callable[[], None]]:
    """Remember `requires_grad` of the layers' parameters; yields what puts it back, which the end calls too.

    PEFT switches these flags when adapters are disabled or enabled, and would thaw a frozen factor. They are put back
    at once: FSDP2 copies them to the gathered parameters the first time that it gathers, even without gradients.
    """
    flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]

    def restore() -> None:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    try:
        yield restore
    finally:
        restore()


@contextmanager
def adapters_disabled(layers: list[nn.Module]) -> Iterator[None]:
    """Switch every adapter off, and those that were on back on."""
    switched = [layer for layer in layers if not layer.disable_adapters]
    with _gradient_flags_kept(layers) as restore:
        try:
            for layer in switched:
                layer.enable_adapters(False)
            restore()
            yield
        finally:
            for layer in switched:
                layer.enable_adapters(True)


@contextmanager
def adapter_active(layers: list[nn.Module], name: str) -> Iterator[None]:
    """Make one adapter the active one where it exists, no adapter elsewhere; then the former ones again."""
    former = [(layer, list(layer.active_adapters)) for layer in layers]
    with _gradient_flags_kept(layers) as restore:
        try:
            for layer in layers:
                layer.set_adapter([name] if name in adapter_names(layer) else [])
            restore()
            yield
        finally:
            for layer, names in former:
                layer.set_adapter(names)


@contextmanager
def _uncached_autocast(device: torch.device) -> Iterator[None]:
    """The surrounding autocast without its cache: copies cast without gradients must not reach the student."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    dtype = torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, dtype=dtype, cache_enabled=False):
        yield
