"""The interface of an operation: its backends, how one is chosen, and example inputs.

An operation is a folder. Its `__init__.py` has the public function and

    OP = Op("name", reference=torch_impl.Torch, backends=("native", "triton", "cuda"), examples=_examples)

The dispatch, `safelora-fast env --self-test`, the `torch.compile` tests and the GPU tests are all driven by OP. The
other files of the folder are its backends. Each has a class with the methods that the public function calls:

- `torch_impl.Torch(dtype)`: torch operations. In float64 it is the oracle that the others are compared with
  (`reference`). Without a dtype it serves devices, dtypes and tensor subclasses that no kernel supports (`eager`).
- `native.Backend`: the extension module, for CPU tensors.
- `triton.Backend`: Triton kernels, for NVIDIA, AMD and Intel GPUs.
- `cuda.Backend`: CUDA kernels launched by the extension module, for NVIDIA GPUs.

All can be imported on every machine. `unsupported_reason` of a backend returns one line that says why it cannot serve
the given tensors, or None. By default the first supported backend in DEFAULTS serves; `SAFELORA_FAST_BACKEND` selects
another. If an operation has no backend of that name, it uses its default. If the backend exists but cannot serve, that
is an error.
"""

from __future__ import annotations

import importlib
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from safelora_fast.errors import BackendError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

BackendName: TypeAlias = Literal["reference", "native", "triton", "cuda", "eager"]
# A function of tensors, and its inputs. Each backend's results are compared with the oracle's (see `outcomes`).
Example: TypeAlias = "tuple[Callable[..., Any], Sequence[torch.Tensor]]"

VARIABLE = "SAFELORA_FAST_BACKEND"
GPUS = ("cuda", "xpu")  # torch also uses "cuda" for AMD
CHOICES: tuple[BackendName, ...] = ("reference", "triton", "cuda")
DEFAULTS: tuple[BackendName, ...] = ("native", "triton", "eager")
# Dtypes that the kernels support, with the extension module's names for them.
DTYPE_NAMES: dict[torch.dtype, Literal["F32", "BF16", "F16"]] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


class Backend:
    """One implementation of an operation; subclasses add the methods that the operation calls."""

    def unsupported_reason(self, tensors: Sequence[torch.Tensor]) -> str | None:  # noqa: ARG002
        """Return one line on why this backend cannot serve the tensors (without any: this machine), or None."""
        return None


class NativeBackend(Backend):
    """Kernels of the extension module, which read CPU tensors in place."""

    def unsupported_reason(self, tensors: Sequence[torch.Tensor]) -> str | None:
        """Return why the kernels cannot read these tensors, or None."""
        return unreadable_reason(tensors, lambda device: device.type == "cpu")


def unreadable_reason(
    tensors: Sequence[torch.Tensor], is_served: Callable[[torch.device], bool], where: str = ""
) -> str | None:
    """Return why kernels cannot read these tensors by address, or None.

    Args:
        tensors: the tensors to read.
        is_served: whether the kernels run on a device.
        where: the devices they run on, for the message.
    """
    for tensor in tensors:
        if not is_served(tensor.device):
            return f"a tensor is on {tensor.device}{where}"
        if tensor.dtype not in DTYPE_NAMES:
            return f"a tensor is {str(tensor.dtype).removeprefix('torch.')}"
        if type(tensor) not in {torch.Tensor, torch.nn.Parameter} or tensor.layout != torch.strided:
            return f"a {type(tensor).__name__} need not have memory of its own"
    return None


@dataclass(frozen=True)
class Choice:
    """The chosen backend.

    Attributes:
        name: name of the backend.
        backend: the backend object.
        reason: why it was chosen, in a few words, for `safelora-fast env`.
    """

    name: BackendName
    backend: Any
    reason: str


@dataclass(frozen=True)
class Op:
    """An operation on tensors.

    Attributes:
        name: name of the operation and of its folder.
        reference: makes the torch implementation that computes in the given dtype; None: in the operands' precision.
        backends: names of the files with kernels.
        examples: yields small examples, given a function that makes a random tensor from a shape and a seed. All
            tensors of one call have the same dtype and device.
    """

    name: str
    reference: Callable[[torch.dtype | None], Backend]
    backends: tuple[BackendName, ...]
    examples: Callable[[Callable[..., torch.Tensor]], Iterator[Example]]
    _loaded: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def names(self) -> tuple[BackendName, ...]:
        """Return the names of all backends of this operation."""
        return ("reference", *self.backends, "eager")

    def backend(self, name: BackendName) -> Any:
        """Return the backend with this name."""
        if name not in self._loaded:
            if name in {"reference", "eager"}:
                self._loaded[name] = self.reference(torch.float64 if name == "reference" else None)
            else:
                self._loaded[name] = importlib.import_module(f"safelora_fast.ops.{self.name}.{name}").Backend()
        return self._loaded[name]

    def choose(self, tensors: Sequence[torch.Tensor]) -> Choice:
        """Choose the backend for these tensors.

        Raises:
            SettingsError: `SAFELORA_FAST_BACKEND` holds an unknown name.
            BackendError: the backend named there cannot serve these tensors; the message says why.
        """
        if _forced and _forced[-1] in self.names:
            return Choice(_forced[-1], self.backend(_forced[-1]), "chosen by the caller")
        name = requested_backend()
        if name is not None and name in self.names:
            reason = self.backend(name).unsupported_reason(tensors)
            if reason is not None:
                raise BackendError(
                    f"{VARIABLE}={name} cannot serve {self.name}: {reason}; unset it, or name another backend"
                )
            return Choice(name, self.backend(name), f"{VARIABLE}={name}")
        reasons: list[str] = []
        for default in DEFAULTS:
            if default in self.names:
                reason = self.backend(default).unsupported_reason(tensors)
                if reason is None:
                    return Choice(default, self.backend(default), "; ".join(reasons))
                reasons.append(f"not {default}: {reason}")
        raise BackendError(f"nothing serves {self.name}: {'; '.join(reasons)}")

    def describe(self) -> str:
        """Return one line that lists the backends available on this machine, and why the others are not.

        Raises:
            SettingsError: `SAFELORA_FAST_BACKEND` holds an unknown name.
        """

        def missing(name: BackendName) -> str | None:
            reason: str | None = self.backend(name).unsupported_reason(())
            return reason

        name = requested_backend()
        if name is not None and name in self.names:
            reason = missing(name)
            return f"{name}, by {VARIABLE}" if reason is None else f"nothing: {VARIABLE}={name}, but {reason}"
        parts = [f"CPU: {self.choose([torch.empty(0)]).name}"]
        device = gpu()
        if device is None:
            parts.append(f"GPU: none here (triton: {missing('triton') or 'its interpreter'})")
        else:
            choice = self.choose([torch.empty(0, device=device)])
            parts.append(f"GPU: {choice.name}" + (f" ({choice.reason})" if choice.name == "eager" else ""))
        if "cuda" in self.names:
            parts.append(f"cuda: {missing('cuda') or f'only with {VARIABLE}=cuda'}")
        return "; ".join(parts)


def requested_backend() -> BackendName | None:
    """Return the backend that `SAFELORA_FAST_BACKEND` names, or None if it is unset or empty.

    Raises:
        SettingsError: the value is not in CHOICES.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    for name in CHOICES:
        if value == name:
            return name
    raise SettingsError(f"{VARIABLE} is {value!r}; it must be {', '.join(CHOICES[:-1])} or {CHOICES[-1]}, or unset")


def gpu() -> torch.device | None:
    """Return torch's default GPU, or None if there is none."""
    for kind in GPUS:
        if hasattr(torch, kind) and getattr(torch, kind).is_available():
            return torch.device(kind)
    return None


_forced: list[BackendName] = []


@contextmanager
def served_by(name: BackendName) -> Iterator[None]:
    """Make one backend serve every operation that has it, without checking whether it can. For tests."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def outcomes(example: Example) -> list[torch.Tensor]:
    """Return the results of an example's function, then the gradients of their sum for inputs that require one."""
    function, inputs = example
    found = function(*inputs)
    values = [found] if isinstance(found, torch.Tensor) else list(found)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not wanted:
        return values
    total = torch.stack([value.sum() for value in values if value.requires_grad]).sum()
    return [value.detach() for value in values] + list(torch.autograd.grad(0.3 * total, wanted))


def require_tensors(**named: object) -> None:
    """Raise TypeError unless every operand is a tensor. The message says which is not, its type, and how to convert it.

    Args:
        named: operands by the caller's names, such as `hidden` or `operands[1]`.
    """
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            continue
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        how = "torch.from_numpy" if kind.startswith("numpy.") else "torch.as_tensor"
        raise TypeError(f"{name} is a {kind}, it must be a torch.Tensor: pass {how}({name.partition('[')[0]})")


def differentiable_once(
    gradients: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], *, owner: str
) -> Sequence[torch.Tensor]:
    """Return the gradients of a backward. Differentiating them again raises RuntimeError.

    They depend on `inputs` through values that the forward saved, which autograd would treat as constants.

    Args:
        gradients: results of the backward.
        inputs: tensors that they depend on.
        owner: name of the operation, for the message.
    """
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        return gradients
    tied: Sequence[torch.Tensor] = _Once.apply(owner, len(gradients), *gradients, *inputs)
    return tied


class _Once(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, owner: str, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.owner = owner
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ARG004
        raise RuntimeError(
            f"{ctx.owner} has no second derivative: leave out create_graph, or take its loss out of the part that is "
            "differentiated twice"
        )
