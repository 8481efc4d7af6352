"""Default `token_type_ids` for models that require them in training, even without an image."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from torch import nn

REQUIRED = "`token_type_ids` is required as a model input when training"  # transformers 5.0 and 5.1, e.g. Gemma 3
TEXT = {"gemma3": 0}  # the type of a token of text


def give_token_types(model: nn.Module) -> None:
    """If a model requires `token_type_ids` in training, add hooks that default them to the type of text.

    Raises:
        SettingsError: the model requires them and its type for text is unknown.
    """
    kind: Any = type(model)
    try:
        source = inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError, KeyError):
        return
    if REQUIRED not in source or "token_type_ids" not in inspect.signature(kind.forward).parameters:
        return
    text = TEXT.get(model.config.model_type)
    if text is None:
        raise SettingsError(
            f"{kind.__name__} of this version of transformers wants token_type_ids in training, which text does not have: "
            "use another version, or another model"
        )

    def told(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        if module.training and kwargs.get("token_type_ids") is None and given is not None:
            types = torch.full(given.shape[:2], text, dtype=torch.long, device=given.device)
            kwargs = {**kwargs, "token_type_ids": types}
        return args, kwargs

    for module in model.modules():  # PEFT calls the outer module's forward directly, so its hooks do not run
        if "token_type_ids" in inspect.signature(module.forward).parameters:
            module.register_forward_pre_hook(told, with_kwargs=True)
