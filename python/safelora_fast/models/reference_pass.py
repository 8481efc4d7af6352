"""The reference pass: running the model before fine-tuning on the student's inputs, without gradients."""

from __future__ import annotations

import inspect
import logging
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from safelora_fast.data.batch_part import Part
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import Anatomy, above, adapter_layers
from safelora_fast.models.call_part import depends_on_longest_row, part_of_call
from safelora_fast.models.capture import Call, Capture, Tap
from safelora_fast.models.reference_checks import (
    adapter_names,
    check_base_reference,
    check_named_reference,
    check_second_model,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

logger = logging.getLogger(__name__)
Reference: TypeAlias = "str | nn.Module"
CACHES = ("past_key_values", "cache")  # before transformers 5.24, and from 5.24 on


class ReferencePass:
    """Runs the reference model and restores the student's state: mode, adapters, `requires_grad` and random state.

    The reference is the whole model before fine-tuning, on the inputs of the whole model in training. If the decoder
    receives these inputs unchanged, as in text models, only the decoder runs. If the model computes tensors first
    (embeddings of images and text, position ids), the reference computes its own, and stops after the decoder.

    It runs in evaluation mode with its initial running statistics, so dropout, NEFTune noise and BatchNorm updates do
    not affect it. The modules that contain the decoder get the student's mode, because some models choose their
    attention mask by it (PaliGemma, Gemma 3).

    Args:
        model: the model in training, with its PEFT wrapper.
        anatomy: the model's parts.
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
            self.anatomy = check_second_model(anatomy, reference)
        elif reference == "base":
            check_base_reference(model)
        else:
            check_named_reference(model, reference)
        self._reference = reference
        self._above = above(self.anatomy.model, self.anatomy.decoder)
        self._statistics = [
            (module, name, getattr(module, name).detach().clone())
            for module in self.anatomy.model.modules()
            for name in ("running_mean", "running_var")
            if isinstance(getattr(module, name, None), torch.Tensor)
        ]
        self._apart: dict[tuple[bool, bool], bool] = {}
        self.tap = Tap(self.anatomy, layers)

    def run(self, whole: Call | None, decoder: Call, *, part: Part | None, around: Callable[[], Any]) -> Capture:
        """Run the reference on the inputs of the student's pass, or on a part of them.

        Args:
            whole: the call of the whole model in training; None if only its decoder was called.
            decoder: the call of its decoder.
            part: the rows to run; None for all.
            around: creates the context to run in (steering applies to the reference too).

        Returns:
            The hidden states of the part. If the inputs cannot be cut, those of the whole batch; then its `part` is None.

        Raises:
            SettingsError: the inputs include a cache, or a tensor that depends on trained parameters.
        """
        if _has_cache(decoder if whole is None else whole):
            raise SettingsError("a key-value cache was given to the training pass: set use_cache=False")
        if whole is None:
            check_inputs(decoder)
        only_decoder = self.runs_decoder(whole, decoder)
        call = decoder if whole is None or only_decoder else whole

        def inputs(part: Part) -> Call | None:
            cut = part_of_call(self.anatomy.decoder if only_decoder else self._student, call, part)
            return None if cut is None or depends_on_longest_row(self.anatomy.config, call, part.tokens) else cut

        def states(call: Call) -> Capture:
            return self._states(call, only_decoder=only_decoder, around=around)

        if part is not None and part.columns is not None:
            documents, rows = inputs(part), inputs(part.by_rows())
            if (
                documents is None
                or rows is None
                or not self._keeps_apart(part, lambda: (states(documents), states(rows)))
            ):
                part = part.by_rows()
        cut = None if part is None else inputs(part)
        capture = states(call if cut is None else cut)
        capture.part = None if cut is None else part
        return capture

    def _keeps_apart(self, part: Part, trial: Callable[[], tuple[Capture, Capture]]) -> bool:
        """Return whether the documents of packed rows have the same hidden states where others are cut out between them.

        Some models ignore positions in their attention mask, or carry a state from one document to the next. Flash
        attention separates documents in a single row only. So each combination of one row or several is tried once.

        Args:
            part: documents of a batch.
            trial: runs the reference on this part, and on all documents of its rows.
        """
        kind = part.batch > 1, len(part.rows) > 1
        assert part.columns is not None  # noqa: S101
        if kind in self._apart or bool((part.columns == torch.arange(part.width)).all()):
            return self._apart.get(kind, False)
        documents, rows = trial()
        assert documents.hidden is not None  # noqa: S101
        assert rows.hidden is not None  # noqa: S101
        among = Part(len(rows.hidden), part.tokens, _places(part), part.width, part.columns)
        expected = among.take(rows.hidden).double()
        error = ((documents.hidden.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
        exact = rows.hidden.dtype in {torch.float32, torch.float64} and rows.autocast is None
        self._apart[kind] = bool(error < (1e-3 if exact else 0.1))
        if not self._apart[kind]:
            logger.info(
                "the reference runs on whole packed rows: %s does not keep their documents apart (hidden states differ by %.2g)",
                type(self.anatomy.model).__name__,
                error.item(),
            )
        return self._apart[kind]

    def _states(self, call: Call, *, only_decoder: bool, around: Callable[[], Any]) -> Capture:
        """Run the reference on these inputs of the decoder, or of the whole model."""
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
            if only_decoder:
                self.anatomy.decoder(*call.args, **call.kwargs)
            else:
                self._run_whole(call)
        return capture

    def runs_decoder(self, whole: Call | None, decoder: Call) -> bool:
        """Return whether a pass on these calls runs the decoder alone, and not the whole model from its own inputs."""
        return whole is None or (_handed_on(whole, decoder) and not self._sharded())

    def _run_whole(self, call: Call) -> None:
        """Run the reference on the inputs of the whole model and stop after its decoder, before head and loss.

        The model in training is already inside its own call, so its hooks, such as those of FSDP2, must not run again.
        `output_*` arguments are dropped: transformers 4.57 implements them by patching modules, and stopping leaves the
        patches in place.
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
        """Return the call's arguments by their names in the model in training.

        Raises:
            SettingsError: the reference does not accept one of them.
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
        """Return whether FSDP2 shards a second model; it gathers embeddings only in a call of the whole model."""
        return not self._own and any(hasattr(p, "full_tensor") for p in self.anatomy.decoder.parameters())

    def _cuda_devices(self) -> list[int]:
        devices = {parameter.device for parameter in self.anatomy.model.parameters()}
        return sorted({device.index or 0 for device in devices if device.type == "cuda"})


def _places(part: Part) -> tuple[int, ...]:
    """Return the places of a part's rows among those of :meth:`Part.by_rows`."""
    rows = part.by_rows().rows
    return tuple(rows.index(row) for row in part.rows)


def check_inputs(call: Call) -> None:
    """Refuse inputs that were computed from trained parameters, because the reference would use them too.

    Raises:
        SettingsError: there is such an input; the message names it.
    """
    for name, tensor in call.tensors():
        if tensor.grad_fn is not None:
            raise SettingsError(
                f"{name} was computed with gradients before the model was called, so what is trained may be in the "
                "reference too: give the model its own inputs (input_ids, pixel_values), or compute it under no_grad"
            )


@contextmanager
def evaluation_mode(module: nn.Module, *, besides: Collection[nn.Module] = (), training: bool = True) -> Iterator[None]:
    """Set a module to evaluation mode and those in `besides` to the mode `training`; restore all modes at the end."""
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
    """Disable every adapter; at the end, enable those that were enabled before."""
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
    """Activate one adapter in the layers that have it and none elsewhere; restore the active adapters at the end."""
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
def _gradient_flags_kept(layers: list[nn.Module]) -> Iterator[Callable[[], None]]:
    """Save `requires_grad` of the layers' parameters; yield a function that restores it, which also runs at the end.

    PEFT changes these flags when it disables or enables adapters, and would unfreeze a frozen matrix. They must be
    restored at once, because FSDP2 copies them to the gathered parameters at the first gather, even without gradients.
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
    """Temporarily restore saved buffers: training changes BatchNorm's running statistics, even in frozen modules."""
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
    """Enter the surrounding autocast without its cache: copies cast without gradients must not reach the student."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    dtype = torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, dtype=dtype, cache_enabled=False):
        yield


class _DecoderDone(BaseException):
    """Raised to end a forward pass after the decoder."""


def _leave(*_: Any) -> None:
    raise _DecoderDone


def _has_cache(call: Call) -> bool:
    return any(call.kwargs.get(name) is not None for name in CACHES)


def _handed_on(whole: Call, decoder: Call) -> bool:
    """Return whether every tensor passed to the decoder is an input of the whole model, not computed from one."""
    given = {id(tensor) for _, tensor in whole.tensors()}
    return not _has_cache(decoder) and all(id(tensor) in given for _, tensor in decoder.tensors())
