"""The reference pass: the model before fine-tuning, run on the student's inputs without gradients."""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from safelora_fast.checkpoints.lora_config import KEEPS_BASE_WEIGHTS
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import Anatomy, above, adapter_configs, adapter_layers, dissect
from safelora_fast.models.capture import Call, Capture, Tap

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

Reference: TypeAlias = "str | nn.Module"
CACHES = ("past_key_values", "cache")  # before and from transformers 5.24


class ReferencePass:
    """Runs the reference model and leaves the student as it was: mode, adapters, `requires_grad` and random state.

    The reference is the whole model before fine-tuning, on the inputs of the whole model in training. If its decoder gets these
    inputs as they came, as in text models, only the decoder runs. If tensors were made on the way (embeddings of images and
    text, position ids), the reference makes its own, up to the decoder's end.

    It runs in evaluation mode, with the running statistics that it had at first: dropout, NEFTune's noise, and what training
    does to a BatchNorm do not reach it. The modules that contain the decoder get the student's mode, because some models choose
    their attention mask by it (PaliGemma, Gemma 3).

    Args:
        model: the model in training, with its PEFT wrapper.
        anatomy: its parts.
        reference: "base" for the same model with its adapters disabled, the name of a frozen adapter of the model, or
            a second model.
        layers: indices of the layers to capture.

    Raises:
        SettingsError: disabling the adapters would not give the original model, or the adapter does not exist.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, reference: Reference, layers: list[int]) -> None:
        self._layers = [layer for _, layer in adapter_layers(anatomy.model)]
        self._student = anatomy.model
        self._own = isinstance(reference, str)
        self.anatomy = anatomy
        if not isinstance(reference, str):
            self.anatomy = _check_second_model(anatomy, reference)
        elif reference == "base":
            _check_base_reference(model)
        else:
            _check_named_reference(model, reference)
        self._reference = reference
        self._above = above(self.anatomy.model, self.anatomy.decoder)
        self._statistics = [
            (module, name, getattr(module, name).detach().clone())
            for module in self.anatomy.model.modules()
            for name in ("running_mean", "running_var")
            if isinstance(getattr(module, name, None), torch.Tensor)
        ]
        self.tap = Tap(self.anatomy, layers)

    def run(self, whole: Call | None, decoder: Call, *, around: Callable[[], Any]) -> Capture:
        """Run the reference on the inputs of the student's pass.

        Args:
            whole: the call of the whole model in training; None if only its decoder was called.
            decoder: the call of its decoder.
            around: makes a context to run in (steering applies to the reference too).

        Raises:
            SettingsError: a cache is among the inputs, or a tensor that depends on what is trained.
        """
        if _has_cache(decoder if whole is None else whole):
            raise SettingsError("a key-value cache was given to the training pass: set use_cache=False")
        if whole is None:
            check_inputs(decoder)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_uncached_autocast(next(self.anatomy.decoder.parameters()).device))
            stack.enter_context(torch.random.fork_rng(devices=self._cuda_devices()))
            mode = self._student.training  # a second model is usually in evaluation mode
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
        Outputs that transformers 4.57 records by patching modules are not asked for: the patches would stay.
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
        """Whether FSDP2 gathers the embeddings of a second model, which it does when the whole model is called."""
        return not self._own and any(hasattr(p, "full_tensor") for p in self.anatomy.decoder.parameters())

    def _cuda_devices(self) -> list[int]:
        devices = {parameter.device for parameter in self.anatomy.model.parameters()}
        return sorted({device.index or 0 for device in devices if device.type == "cuda"})


def check_inputs(call: Call) -> None:
    """Refuse inputs that were computed from what is trained: the reference would be run on them too.

    Raises:
        SettingsError: with the name of the input.
    """
    for name, tensor in call.tensors():
        if tensor.grad_fn is not None:
            raise SettingsError(
                f"{name} was computed with gradients before the model was called, so what is trained may be in the "
                "reference too: give the model its own inputs (input_ids, pixel_values), or compute it under no_grad"
            )


@contextmanager
def evaluation_mode(module: nn.Module, *, besides: Collection[nn.Module] = (), training: bool = True) -> Iterator[None]:
    """Put a module in evaluation mode, those in `besides` in the mode `training`, and then all back in their own."""
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
    """Make one adapter the active one in the layers that have it, no adapter elsewhere; then the former ones again."""
    former = [(layer, list(layer.active_adapters)) for layer in layers]
    with _gradient_flags_kept(layers) as restore:
        try:
            for layer in layers:
                layer.set_adapter([name] if name in _adapter_names(layer) else [])
            restore()
            yield
        finally:
            for layer, names in former:
                layer.set_adapter(names)


@contextmanager
def _gradient_flags_kept(layers: list[nn.Module]) -> Iterator[Callable[[], None]]:
    """Remember `requires_grad` of the layers' parameters; yields a function that restores it, also called at the end.

    PEFT switches these flags when adapters are disabled or enabled, and would thaw a frozen factor. They are restored at
    once: FSDP2 copies them to the gathered parameters the first time that it gathers, even without gradients.
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
def _buffers_as(values: list[tuple[nn.Module, str, torch.Tensor]]) -> Iterator[None]:
    """Give buffers their former values: training changes the running statistics of a BatchNorm, frozen or not."""
    now = [(module, name, getattr(module, name)) for module, name, _ in values]
    try:
        for (module, name, value), (*_, current) in zip(values, now, strict=True):
            setattr(module, name, value.to(current))
        yield
    finally:
        for module, name, current in now:
            setattr(module, name, current)


@contextmanager
def _uncached_autocast(device: torch.device) -> Iterator[None]:
    """The surrounding autocast without its cache: copies cast without gradients must not reach the student."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    dtype = torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, dtype=dtype, cache_enabled=False):
        yield


class _DecoderDone(BaseException):
    """Ends a pass that runs only for its decoder's hidden states."""


def _leave(*_: Any) -> None:
    raise _DecoderDone


def _has_cache(call: Call) -> bool:
    return any(call.kwargs.get(name) is not None for name in CACHES)


def _handed_on(whole: Call, decoder: Call) -> bool:
    """Whether every tensor that the decoder got is an input of the whole model: nothing was computed on the way."""
    given = {id(tensor) for _, tensor in whole.tensors()}
    return not _has_cache(decoder) and all(id(tensor) in given for _, tensor in decoder.tensors())


# What can serve as reference.


def _check_base_reference(model: nn.Module) -> None:
    """Refuse models for which disabling the adapters does not give back the model before fine-tuning."""
    layers = adapter_layers(model)
    if not layers:
        raise SettingsError(
            "the model has no adapter to disable: wrap it with PEFT, or give the model before fine-tuning as reference="
        )
    for name, config in adapter_configs(model).items():
        if getattr(config, "is_prompt_learning", False):
            raise SettingsError(f"adapter {name!r} adds tokens to the prompt, which the reference lacks")
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.lower() not in KEEPS_BASE_WEIGHTS:
            raise SettingsError(
                f"adapter {name!r} was initialized by {start!r}, which may rewrite the base weights: with the "
                "adapter disabled the model is not the original; use a plain initialization, or give a frozen copy of the "
                "adapter as reference="
            )
        _check_bias(name, config)
    _check_trained(model, layers)


def _check_named_reference(model: nn.Module, name: str) -> None:
    """Refuse an adapter name that does not exist or is in training, and a model that is trained beside its adapters."""
    named = adapter_layers(model)
    known = sorted({adapter for _, layer in named for adapter in _adapter_names(layer)})
    if name not in known:
        raise SettingsError(f"reference adapter {name!r} does not exist; the model has {', '.join(known) or 'none'}")
    if any(name in layer.active_adapters for _, layer in named):
        raise SettingsError(f"reference adapter {name!r} is the one in training: load a frozen copy under another name")
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name and parameter.requires_grad:
            raise SettingsError(f"reference adapter {name!r} is trained ({parameter_name}): freeze it")
    for adapter, config in adapter_configs(model).items():
        _check_bias(adapter, config)
    _check_trained(model, named)


def _check_second_model(anatomy: Anatomy, reference: nn.Module) -> Anatomy:
    """The parts of a second model; refuse one that cannot be compared layer by layer with the model in training."""
    other = dissect(reference)
    if other.model is anatomy.model:
        raise SettingsError('reference= is the model in training: give a frozen copy, or "base"')
    if other.depth != anatomy.depth or other.config.hidden_size != anatomy.config.hidden_size:
        raise SettingsError(
            f"the reference has {other.depth} layers of width {other.config.hidden_size}, "
            f"the model {anatomy.depth} of width {anatomy.config.hidden_size}"
        )
    return other


def _check_trained(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> None:
    """Refuse a model whose weights outside its adapters change: they would change the reference too."""
    adapter_parameters = set()
    for name, layer in layers:
        if getattr(layer, "merged", False):
            raise SettingsError(f"{name}: the adapter is merged into the weight: unmerge it first")
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
        originals = {id(parameter) for parameter in base.parameters()}
        adapter_parameters |= {id(parameter) for parameter in layer.parameters()} - originals
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in adapter_parameters:
            raise SettingsError(
                f"{name} is trained and belongs to no adapter, so the reference, which shares it, would be trained too: "
                "freeze it, or give a frozen copy of the model as reference="
            )


def _check_bias(name: str, config: Any) -> None:
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise SettingsError(
            f'adapter {name!r} trains biases (bias="{bias}"), which switching it off does not undo: use bias="none", '
            "or give a second model as reference="
        )


def _adapter_names(layer: nn.Module) -> set[str]:
    """The names of the adapters that a PEFT layer holds."""
    holders = [getattr(layer, attribute, None) for attribute in layer.adapter_layer_names]
    return {name for holder in holders if isinstance(holder, nn.ModuleDict | nn.ParameterDict) for name in holder}
