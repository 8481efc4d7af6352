"""What every operation has: its backends, the choice among them, and examples.

An operation is a folder. Its `__init__.py` has the public function and

    OP = Op("name", reference=torch_impl.Torch, backends=("native", "triton", "cuda"), examples=_examples)

from which come the dispatch, `safelora-fast env --self-test`, the tests of `torch.compile` and the tests on a GPU. The other
files of the folder are its backends, each with a class that has the methods the public function calls:

- `torch_impl.Torch(dtype)`: torch operations. In float64 it is the oracle that the others are compared with (`reference`);
  without a dtype it serves what the kernels do not: other devices and dtypes, tensor subclasses (`eager`).
- `native.Backend`: the extension module, for tensors on the CPU.
- `triton.Backend`: Triton kernels, for GPUs of NVIDIA, AMD and Intel.
- `cuda.Backend`: CUDA kernels launched by the extension module, for NVIDIA GPUs.

All can be imported on every machine. `unsupported_reason` of a backend says in one line why it cannot serve the given
tensors, or gives None. By default the first supported backend of DEFAULTS serves. `SAFELORA_FAST_BACKEND` names another one.
An operation that has no such backend is served as by default; a backend that exists but cannot serve is an error.
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
# A function of tensors and its inputs. What a backend gives for it is compared with the oracle (see `outcomes`).
Example: TypeAlias = "tuple[Callable[..., Any], Sequence[torch.Tensor]]"

VARIABLE = "SAFELORA_FAST_BACKEND"
CHOICES: tuple[BackendName, ...] = ("reference", "triton", "cuda")
DEFAULTS: tuple[BackendName, ...] = ("native", "triton", "eager")
# What kernels read, by the names that the extension module uses.
DTYPE_NAMES: dict[torch.dtype, Literal["F32", "BF16", "F16"]] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


class Backend:
    """One way to compute an operation; subclasses add the methods that the operation calls."""

    def unsupported_reason(self, tensors: Sequence[torch.Tensor]) -> str | None:  # noqa: ARG002
        """Say in one line why this backend cannot serve the tensors, or None. Without tensors: why not on this machine."""
        return None


class NativeBackend(Backend):
    """Kernels of the extension module, which read tensors of the CPU where they lie."""

    def unsupported_reason(self, tensors: Sequence[torch.Tensor]) -> str | None:
        """Say why the kernels cannot read these tensors, or None."""
        return unreadable_reason(tensors, lambda device: device.type == "cpu")


def unreadable_reason(
    tensors: Sequence[torch.Tensor], is_served: Callable[[torch.device], bool], where: str = ""
) -> str | None:
    """Say why kernels cannot read these tensors by their addresses, or None.

    Args:
        tensors: what they would read.
        is_served: whether the kernels run on a device.
        where: what the message says about the devices that they run on.
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
    """The backend that serves.

    Attributes:
        name: of the backend.
        backend: its object.
        reason: why it is this one, in a few words for `safelora-fast env`.
    """

    name: BackendName
    backend: Any
    reason: str


@dataclass(frozen=True)
class Op:
    """An operation on tensors.

    Attributes:
        name: of the operation and of its folder.
        reference: makes the torch form that computes in a dtype; None: in the usual precision of the operands.
        backends: names of the files with kernels.
        examples: makes small examples from a function that gives random tensors by shape and seed, all of one dtype and
            device.
    """

    name: str
    reference: Callable[[torch.dtype | None], Backend]
    backends: tuple[BackendName, ...]
    examples: Callable[[Callable[..., torch.Tensor]], Iterator[Example]]
    _loaded: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def names(self) -> tuple[BackendName, ...]:
        """Every backend that this operation has."""
        return ("reference", *self.backends, "eager")

    def backend(self, name: BackendName) -> Any:
        """The backend of this name."""
        if name not in self._loaded:
            if name in {"reference", "eager"}:
                self._loaded[name] = self.reference(torch.float64 if name == "reference" else None)
            else:
                self._loaded[name] = importlib.import_module(f"safelora_fast.ops.{self.name}.{name}").Backend()
        return self._loaded[name]

    def choose(self, tensors: Sequence[torch.Tensor]) -> Choice:
        """Choose the backend that serves these tensors.

        Raises:
            SettingsError: `SAFELORA_FAST_BACKEND` holds an unknown name.
            BackendError: the backend that it names cannot serve these tensors; the message says why.
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
        """Say which backends serve on this machine, and why not others, in one line.

        Raises:
            SettingsError: `SAFELORA_FAST_BACKEND` holds an unknown name.
        """
        from safelora_fast.ops.triton_runtime import gpu

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
    """The backend that `SAFELORA_FAST_BACKEND` names, None where it is unset or empty.

    Raises:
        SettingsError: it is not one of CHOICES.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    for name in CHOICES:
        if value == name:
            return name
    raise SettingsError(f"{VARIABLE} is {value!r}; it must be {', '.join(CHOICES[:-1])} or {CHOICES[-1]}, or unset")


_forced: list[BackendName] = []


@contextmanager
def served_by(name: BackendName) -> Iterator[None]:
    """Let one backend serve every operation that has it, without asking whether it can: to test that backend."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def outcomes(example: Example) -> list[torch.Tensor]:
    """What the function of an example gives, then the gradients of its sum in the inputs that require one."""
    function, inputs = example
    found = function(*inputs)
    values = [found] if isinstance(found, torch.Tensor) else list(found)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not wanted:
        return values
    total = torch.stack([value.sum() for value in values if value.requires_grad]).sum()
    return [value.detach() for value in values] + list(torch.autograd.grad(0.3 * total, wanted))


def require_tensors(**named: object) -> None:
    """Raise TypeError unless every operand is a tensor, with its name, what it is, and how to make a tensor of it.

    Args:
        named: operands by the names that the caller knows, such as `hidden` or `operands[1]`.
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
    """Return the gradients of a backward; where a graph of them is recorded, differentiating them raises RuntimeError.

    They depend on `inputs` by way of what the forward kept, which autograd takes for constant.

    Args:
        gradients: what the backward gives.
        inputs: tensors that they depend on.
        owner: the operation, for the message.
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
