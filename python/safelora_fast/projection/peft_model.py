"""Projection of an adapter of a loaded PeftModel."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.adapter import WEIGHTS
from safelora_fast.errors import MissingDependencyError, SafeLoraFastError, SettingsError, how_to_install
from safelora_fast.files.progress import bar_on_a_terminal, log_warnings
from safelora_fast.projection.jobs import start_stream
from safelora_fast.projection.merge import starting
from safelora_fast.projection.project import project_folders
from safelora_fast.projection.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from peft import LoraConfig, PeftModel

    from safelora_fast.projection.jobs import Plan, Start, Stream
    from safelora_fast.projection.report import ProjectionReport

logger = logging.getLogger(__name__)


def project_peft_model(
    model: PeftModel,
    *,
    aligned: str | Path,
    base: str | Path,
    adapter_name: str = "default",
    new_adapter_name: str = "safe",
    device: str | torch.device | None = None,
    **settings: Any,
) -> ProjectionReport:
    """Add a projected copy of an adapter to a PeftModel; the model, the original adapter and gradients do not change.

    The adapter is saved to a temporary folder and projected as by :func:`project_adapter`. The result is loaded under
    the new name, on the devices and in the dtypes of the original. The original adapter stays active until
    `model.set_adapter(new_adapter_name)`; a log message says so.

    With a `device`, the products with V run there, with one launch per batch of modules, while the next batch is read
    (:func:`safelora_fast.ops.subspace_projections`). The device needs 512 MiB for a batch, or room for both weights of
    a larger module, plus room for the factors. If the model already has the aligned checkpoint's weights on this
    device, only the base is read. Metrics agree with those of the CPU to about 1e-6. The default is the CPU because the
    speed of the two has not been compared.

    Args:
        model: the model with the adapter.
        aligned: path or Hub id of the model that the adapter was trained on.
        base: path or Hub id of the model before alignment.
        adapter_name: the adapter to project.
        new_adapter_name: the name of the projected adapter, which must not exist yet.
        device: where to compute: "cuda", "cuda:1", "xpu", or "cpu" for the same operations in torch; None uses the
            extension on the CPU.
        **settings: settings and `progress`, see :func:`project_adapter`.

    Returns:
        The report; it names the adapter as in the model, and `output` is None because no files are kept.

    Raises:
        SettingsError: the model is not a PeftModel or lacks the adapter, the new name is taken or invalid in PEFT, an
            adapter is merged, or `device` is of an unsupported type.
        BackendError: this machine lacks the device, or the device has too little memory.
        SafeLoraFastError: see :func:`project_adapter`.
    """
    _check(model, adapter_name, new_adapter_name)
    unknown = settings.keys() & {"output", "overwrite", "adapter"}
    if unknown:
        raise SettingsError(f"{', '.join(sorted(unknown))} cannot be set here: the result goes into the model")
    start: Start = start_stream if device is None else _starter(model, device)
    with tempfile.TemporaryDirectory(prefix="safelora-fast-") as folder:
        model.save_pretrained(folder, selected_adapters=[adapter_name])
        saved = Path(folder) if adapter_name == "default" else Path(folder, adapter_name)
        options = {"aligned": aligned, "base": base, **settings}
        with (
            bar_on_a_terminal(settings.get("progress")) as options["progress"],
            naming_adapter(saved, adapter_name),
            projected_folder(saved, adapter_name, start=start, **options) as (report, projected),
        ):
            _load(model, projected, adapter_name, new_adapter_name)
    log_warnings(report.warnings)
    logger.warning(
        "adapter %r holds the projection of %r, which is not active yet: call model.set_adapter(%r) before the model is used",
        new_adapter_name,
        adapter_name,
        new_adapter_name,
    )
    return report


@contextlib.contextmanager
def projected_folder(
    saved: Path, adapter_name: str, *, start: Start = start_stream, **options: Any
) -> Iterator[tuple[ProjectionReport, Path]]:
    """Project a temporarily saved adapter into a temporary folder.

    Args:
        saved: the adapter's folder.
        adapter_name: its name in the model, for the report.
        start: starts the stream over the plan.
        **options: `aligned`, `base` and settings, see :func:`project_adapter`.

    Yields:
        The report, and the folder of the projected adapter, which is removed on exit.
    """
    with tempfile.TemporaryDirectory(prefix="safelora-fast-") as folder:
        projected = Path(folder, "projected")
        where = {name: options.pop(name) for name in ("aligned", "base", "progress") if name in options}
        report = project_folders(
            saved, Settings(**options), output=projected, start=starting(start), keep_keys=True, **where
        )
        adapters = [replace(adapter, adapter=adapter_name, output=None) for adapter in report.adapters]
        yield replace(report, adapters=adapters), projected


@contextlib.contextmanager
def naming_adapter(saved: Path, adapter_name: str) -> Iterator[None]:
    """Replace the temporary folder in error messages by the adapter's name in the model."""
    try:
        yield
    except SafeLoraFastError as error:
        message = str(error)
        for path in (saved / WEIGHTS, saved):
            message = message.replace(str(path), f"adapter {adapter_name!r}")
        raise type(error)(message) from error


def lora_parameters(model: Any, adapter_name: str) -> tuple[dict[str, torch.nn.Parameter], list[str]]:
    """Return the parameters of one LoRA adapter under the keys that PEFT saves.

    Args:
        model: a PeftModel, or another model with `peft_config`.
        adapter_name: the name of the adapter.

    Returns:
        The factors by key, and the keys of other trained parameters (modules_to_save, biases).
    """
    from peft import get_peft_model_state_dict

    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = get_peft_model_state_dict(
        model, state_dict=parameters, adapter_name=adapter_name, save_embedding_layers=False
    )
    factors = {key: parameter for key, parameter in state.items() if ".lora_" in key}
    return factors, sorted(state.keys() - factors.keys())


def save_tensors(tensors: Mapping[str, torch.Tensor], config: LoraConfig, folder: Path) -> Path:
    """Save an adapter's tensors and configuration as PEFT does, and return the folder."""
    from safetensors.torch import save_file

    config.save_pretrained(str(folder))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def _starter(model: PeftModel, name: str | torch.device) -> Start:
    """Return a function that starts a stream on a device, and uses the model's weights if they are the aligned ones."""
    from safelora_fast.projection.device.resident import resident_weights
    from safelora_fast.projection.device.stream import DeviceStream, torch_device

    device = torch_device(name)

    def start(plan: Plan, settings: Settings, *, keep_projected: bool) -> Stream:
        resident = resident_weights(model, plan, device)
        return DeviceStream(plan, settings, device=device, keep_projected=keep_projected, resident=resident)

    return start


def _check(model: object, name: str, new_name: object) -> None:
    try:
        from peft import PeftModel
    except ModuleNotFoundError:
        raise MissingDependencyError(f"project_peft_model needs peft: {how_to_install('train')}") from None
    from torch import nn

    if not isinstance(model, PeftModel):
        raise SettingsError(
            f"model must be a PeftModel that carries the adapter, not {type(model).__name__}; of an adapter on disk, "
            "project_adapter takes the folder"
        )
    if name not in list(model.peft_config):
        raise SettingsError(f"the model has no adapter {name!r}; it has {', '.join(map(repr, model.peft_config))}")
    # PEFT keeps factors in ModuleDicts; their keys cannot contain a dot or equal an attribute of ModuleDict.
    if not isinstance(new_name, str) or not new_name or "." in new_name or hasattr(nn.ModuleDict, new_name):
        raise SettingsError(f"new_adapter_name {new_name!r} cannot name an adapter; choose a word without a dot")
    if new_name in model.peft_config:
        raise SettingsError(f"the model has an adapter {new_name!r} already; choose another new_adapter_name")
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise SettingsError("an adapter is merged into the model's weights; call unmerge_adapter() first")


def _load(model: PeftModel, folder: Path, adapter_name: str, new_adapter_name: str) -> None:
    """Load the projected adapter on the original's device and in its dtype; keep the active and trained adapters."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {module: module.training for module in model.modules()}
    active = model.active_adapters
    model.load_adapter(str(folder), new_adapter_name, is_trainable=False, autocast_adapter_dtype=False)
    parameters: dict[str, torch.nn.Parameter] = dict(model.named_parameters())
    for name, parameter in parameters.items():
        original = parameters.get(name.replace(f".{new_adapter_name}.", f".{adapter_name}."))
        if name not in trained and original is not None:
            parameter.data = parameter.data.to(original.device, original.dtype)
    model.base_model.set_adapter(active)
    for module in model.modules():
        module.training = modes.get(module, model.training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.get(name, False))
