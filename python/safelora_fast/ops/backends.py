"""Which backend serves an operation for given tensors, and why.

The folder of an operation holds its backends, one module each (those of `subspace_projections` are `grouped_…`):

- `reference`: the definition, computed in float64 by plain torch: the truth that the others are compared with;
- `native`: the extension module, for tensors on the CPU;
- `triton`: Triton kernels, for GPUs of NVIDIA, AMD and Intel;
- `cuda`: CUDA kernels launched by the extension module, for GPUs of NVIDIA;
- `eager`: torch operations, for what is left: other devices and dtypes, subclasses of tensors.

Each is importable on every machine, and imports what may be missing (triton, a driver) inside its functions. Each has the
functions that its operation calls, with the same signatures and meaning as in the other modules, and

    refusal(tensors: Sequence[torch.Tensor]) -> str | None

which says in one line why it cannot serve these tensors, or None. With no tensors it speaks of the machine alone.

By default the first of DEFAULTS that does not refuse serves. `SAFELORA_FAST_BACKEND` names another one; it never falls back
to a different form of an operation silently, except that an operation which has no such form at all (there is no `cuda`
form of linear_kl) is served as by default.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from safelora_fast.errors import BackendError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

Backend = Literal["reference", "native", "triton", "cuda", "eager"]
Operation = Literal["feature_distance", "linear_kl", "subspace_projection", "subspace_projections"]

VARIABLE = "SAFELORA_FAST_BACKEND"
CHOICES: tuple[Backend, ...] = ("reference", "triton", "cuda")
DEFAULTS: tuple[Backend, ...] = ("native", "triton", "eager")


@dataclass(frozen=True)
class Choice:
    """The backend that serves, and why it is this one.

    Attributes:
        name: of the backend.
        module: its module.
        reason: a few words for `safelora-fast env`.
    """

    name: Backend
    module: Any
    reason: str


def choose(operation: Operation, tensors: Sequence[torch.Tensor]) -> Choice:
    """The backend that serves `operation` on these tensors.

    Args:
        operation: its name.
        tensors: those that the backend must read; with none, what the machine alone allows.

    Raises:
        SettingsError: `SAFELORA_FAST_BACKEND` holds an unknown name.
        BackendError: the backend that it names cannot serve these tensors; the message says why.
    """
    name = asked()
    if name is not None and has_form(operation, name):
        module = form(operation, name)
        refusal = module.refusal(tensors)
        if refusal is not None:
            raise BackendError(
                f"{VARIABLE}={name} cannot serve {operation}: {refusal}; unset it, or name another backend"
            )
        return Choice(name, module, f"{VARIABLE}={name}")
    refused: list[str] = []
    for default in DEFAULTS:
        if not has_form(operation, default):
            continue
        module = form(operation, default)
        refusal = module.refusal(tensors)
        if refusal is None:
            return Choice(default, module, "; ".join(refused))
        refused.append(f"not {default}: {refusal}")
    raise BackendError(f"nothing serves {operation}: {'; '.join(refused)}")


def describe(operation: Operation) -> str:
    """Which backends serve an operation on this machine, and why not others, in one line.

    Raises:
        SettingsError: `SAFELORA_FAST_BACKEND` holds an unknown name.
    """
    import torch

    from safelora_fast.ops.triton_runtime import gpu

    name = asked()
    if name is not None and has_form(operation, name):
        refusal = form(operation, name).refusal(())
        return f"{name}, by {VARIABLE}" if refusal is None else f"nothing: {VARIABLE}={name}, but {refusal}"
    device = gpu()
    parts = [f"CPU: {choose(operation, [torch.empty(0)]).name}"]
    if device is None:
        parts.append(f"GPU: none here (triton: {form(operation, 'triton').refusal(()) or 'its interpreter'})")
    else:
        choice = choose(operation, [torch.empty(0, device=device)])
        parts.append(f"GPU: {choice.name}" + (f" ({choice.reason})" if choice.name == "eager" else ""))
    if has_form(operation, "cuda"):
        refusal = form(operation, "cuda").refusal(())
        parts.append(f"cuda: {refusal or f'by {VARIABLE}=cuda alone'}")
    return "; ".join(parts)


def asked() -> Backend | None:
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


def has_form(operation: Operation, backend: Backend) -> bool:
    """Whether an operation has a form of this kind, on any machine."""
    return (operation, backend) in _FORMS


def form(operation: Operation, backend: Backend) -> Any:
    """The module of a backend of an operation."""
    module = _loaded.get((operation, backend))
    if module is None:
        module = importlib.import_module(f"safelora_fast.ops.{_FILES[operation].format(backend)}".replace("/", "."))
        _loaded[operation, backend] = module
    return module


# The file of a backend; that of all modules at once lives beside that of one.
_FILES: dict[Operation, str] = {
    "feature_distance": "feature_distance/{}",
    "linear_kl": "linear_kl/{}",
    "subspace_projection": "subspace_projection/{}",
    "subspace_projections": "subspace_projection/grouped_{}",
}
_loaded: dict[tuple[Operation, Backend], Any] = {}
# What there is, read once from the folders, so that a new backend is a new file and nothing else.
_FORMS = frozenset(
    (operation, backend)
    for operation in get_args(Operation)
    for backend in get_args(Backend)
    if (Path(__file__).parent / f"{_FILES[operation].format(backend)}.py").is_file()
)
