"""An adapter put on a loaded model by PEFT: under the names of that model, on as many tokens as the adapter was trained with."""

from __future__ import annotations

import contextlib
import re
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.adapter import WEIGHTS
from safelora_fast.errors import AdapterError, SafeLoraFastError
from safelora_fast.models.adapter_fit import CONVERTED, fit_adapter
from safelora_fast.models.foreign_errors import explained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safelora_fast.models.adapter_fit import Fit

INCOMPLETE = "Found missing adapter keys"


def put_adapter(model: Any, folder: Path, *, name: str = "default", fit: Fit | None = None) -> Any:
    """The model with an adapter on it.

    Args:
        model: a model of transformers, which is changed: it gets the adapter's modules, and its vocabulary is resized where the
            adapter was trained with more tokens; or a PeftModel, to which another adapter is added.
        folder: of the adapter.
        name: of the adapter in the PeftModel.
        fit: what :func:`fit_adapter` found, which must be given for a PeftModel.

    Raises:
        AdapterError: the adapter does not fit the model.
    """
    from peft import PeftModel

    fit = fit_adapter(folder, model) if fit is None else fit
    try:
        if fit.vocabulary is not None:
            model.resize_token_embeddings(fit.vocabulary, mean_resizing=False)
        with warnings.catch_warnings(), _under_its_names(fit) as where:
            warnings.filterwarnings("error", message=INCOMPLETE)
            if isinstance(model, PeftModel):
                model.load_adapter(str(where), adapter_name=name)
                adapted = model
            else:
                adapted = PeftModel.from_pretrained(model, str(where), adapter_name=name)
        _check_loaded(adapted, name, fit)
    except UserWarning as error:
        raise AdapterError(
            f"{folder}: lacks weights for modules of this model: was it trained on another one?"
        ) from error
    except SafeLoraFastError:
        raise
    except Exception as error:  # a configuration that was edited by hand makes PEFT raise what it runs into
        raise AdapterError(f"{folder}: the adapter cannot be put on the model: {explained(error)}") from error
    return adapted


@contextlib.contextmanager
def _under_its_names(fit: Fit) -> Iterator[Path]:
    """The adapter's folder, or a copy of it in which PEFT finds everything under the names of the model."""
    if not fit.renamed:
        yield fit.folder
        return
    from peft import PeftConfig
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="safelora-fast-") as place:
        config: Any = PeftConfig.from_pretrained(str(fit.folder))
        _name_modules(config, fit)
        config.save_pretrained(place)
        tensors = {fit.keys[key]: tensor for key, tensor in load_file(fit.folder / WEIGHTS).items()}
        save_file(tensors, Path(place, WEIGHTS), {"format": "pt"})
        yield Path(place)


def _name_modules(config: Any, fit: Fit) -> None:
    """Have a LoraConfig say of every module of the model by its whole name what it said of it by the adapter's name."""
    alphas, config.alpha_pattern, config.rank_pattern = config.alpha_pattern or {}, {}, {}
    for module, (former, rank) in fit.modules.items():
        key = re.escape(module)
        config.rank_pattern[key] = rank
        pattern = next((one for one in alphas if re.match(rf"(.*\.)?({one})$", former)), None)
        config.alpha_pattern[key] = config.lora_alpha if pattern is None else alphas[pattern]
    if not any(CONVERTED.fullmatch(key) for key in fit.keys):
        config.target_modules = sorted(fit.modules)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _check_loaded(adapted: Any, name: str, fit: Fit) -> None:
    """Refuse factors that PEFT left out, because the adapter's configuration does not ask for their modules."""
    from peft import get_peft_model_state_dict

    loaded = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    for key, new in fit.keys.items():
        if ".lora_" in new and new not in loaded and not CONVERTED.fullmatch(new):
            raise AdapterError(
                f"{fit.folder}: holds weights for modules that its configuration does not ask for (target_modules and the like), "
                f"e.g. {key}: PEFT leaves them out"
            )
