"""Where a model's attention keys and values come from: found by running it and comparing with its key-value cache.

A cache holds the keys after rotary embedding. With every token at position 0 that embedding changes nothing, so the
cache shows the keys before it, after projection and any normalization. No names of modules or families are needed, and
whatever a model does to keys otherwise (slices of a fused projection, normalized keys, one factor) is seen in numbers.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import adapter_layers, without_parallel
from safelora_fast.models.capture import Tap
from safelora_fast.models.reference_pass import CACHES, evaluation_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from safelora_fast.models.anatomy import Anatomy

TOKENS = 5  # of the trial
SAME = 1e-4  # 1 - cosine; rounding to bfloat16 gives 1e-5, and a norm that was left out more than 1e-2


@dataclass(frozen=True)
class AttentionState:
    """Keys or values of one layer.

    Attributes:
        layer: index of the layer.
        kind: "keys" or "values".
        module: name, inside of the layer, of the module whose output holds them.
        read: takes them out of that output: [batch, tokens, features], keys before rotary embedding.
    """

    layer: int
    kind: str
    module: str
    read: Callable[[torch.Tensor], torch.Tensor]


def find_attention_states(
    model: nn.Module, anatomy: Anatomy, layers: Sequence[int] | None, *, owner: str
) -> tuple[list[AttentionState], bool]:
    """Find the keys and values of layers by running a few tokens. Collective under FSDP2.

    Args:
        model: the model with its wrappers.
        anatomy: its parts.
        layers: indices of layers; None for every layer that has keys and values of its own. (Layers of linear attention
            have none, and some layers use those of another.)
        owner: the defense's name, for messages.

    Returns:
        Keys, then values, of each layer in order; and whether they depend on the token's absolute position.

    Raises:
        SettingsError: the keys or values of a layer are not the output of one module, such as with latent attention.
    """
    try:
        outputs, cache = _run(model, anatomy, 0)
        moved, _ = _run(model, anatomy, TOKENS) if _takes_positions(anatomy) else ({}, None)
    except Exception as error:  # model code may raise anything
        raise SettingsError(
            f"{owner}: {type(anatomy.model).__name__} does not run with a key-value cache ({type(error).__name__}: {error}), so "
            "its keys cannot be found: leave this defense out"
        ) from error
    states: list[AttentionState] = []
    for index in range(anatomy.depth) if layers is None else layers:
        cached = _cached(cache, index)
        ran = {name.partition(" ")[2]: output for name, output in outputs.items() if name.startswith(f"{index} ")}
        found = [] if cached is None else list(_match(index, ran, *cached))
        if len(found) == 2:
            states += found
        elif layers is not None or cached is not None:
            raise SettingsError(
                f"{owner}: the keys and values of layer {index} of {type(anatomy.model).__name__} are not the output of a "
                "module (as with latent or linear attention): leave this defense out, or give other layers="
            )
    if not states:
        raise SettingsError(f"{owner}: no layer of {type(anatomy.model).__name__} has keys and values of its own")
    first = f"{states[0].layer} {states[0].module}"
    return states, first not in moved or not _same(moved[first], outputs[first])


def _run(model: nn.Module, anatomy: Anatomy, position: int) -> tuple[dict[str, torch.Tensor], Any]:
    """Run a few tokens, all at one position. Return module outputs by "layer module", and the key-value cache."""
    device = next(model.parameters()).device
    ids = torch.arange(1, TOKENS + 1, device=device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True}
    if _takes_positions(anatomy):
        inputs["position_ids"] = torch.full_like(ids, position)
    tuners = {id(part) for _, layer in adapter_layers(anatomy.model) for part in layer.modules() if part is not layer}
    picks = {
        f"{index} {name}": (module, _tensor)
        for index, layer in enumerate(anatomy.layers)
        for name, module in layer.named_modules()
        if name and id(module) not in tuners  # the parts of an adapted module give its output without the adapter
    }
    tap = Tap(anatomy, [])
    tap.attach(picks)
    try:
        model = without_parallel(model)
        with torch.no_grad(), evaluation_mode(model), torch.compiler.set_stance("force_eager"):
            capture = tap.begin()
            output = model(**inputs)
    finally:
        tap.detach()
    return capture.picked, next((output[name] for name in reversed(CACHES) if output.get(name) is not None), None)


def _takes_positions(anatomy: Anatomy) -> bool:
    return "position_ids" in inspect.signature(anatomy.model.forward).parameters


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else torch.zeros(0)


def _cached(cache: Any, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return keys and values [heads, tokens, width] of a layer from a cache; None if it holds none."""
    layers = getattr(cache, "layers", None)
    if layers is None or index >= len(layers):
        return None
    keys, values = (getattr(layers[index], name, None) for name in ("keys", "values"))
    if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor) or keys.dim() != 4:
        return None
    return keys[0], values[0]


def _match(
    index: int, outputs: dict[str, torch.Tensor], keys: torch.Tensor, values: torch.Tensor
) -> Iterator[AttentionState]:
    """Yield the keys and values of a layer whose source is found: the last module that gives what the cache holds."""
    for kind, cached in (("keys", keys), ("values", values)):
        wanted = cached.transpose(0, 1).flatten(1)
        for name, output in reversed(outputs.items()):
            read = next(
                (read for read in _readings(kind, output, keys, values) if _same(read(output)[0], wanted)), None
            )
            if read is not None:
                yield AttentionState(index, kind, name, read)
                break


def _readings(
    kind: str, output: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Yield the ways in which an output of this shape could hold keys or values [heads, tokens, width]."""
    heads, tokens, width = (keys if kind == "keys" else values).shape
    sizes = (keys.shape[2], values.shape[2])
    if output.shape == (1, tokens, heads * width) or output.shape == (1, tokens, heads, width):
        yield _by_token
    if output.shape == (1, heads, tokens, width):
        yield _by_head
    fused = output.shape[-1] if output.dim() == 3 else 0
    for groups in (1, heads):  # queries, keys and values one after the other, or together for each head of keys
        of_group = heads // groups
        if fused % groups == 0 and fused // groups > of_group * sum(sizes):
            end = fused // groups - (of_group * sizes[1] if kind == "keys" else 0)
            yield partial(_fused, groups=groups, start=end - of_group * width, end=end)


def _by_token(output: torch.Tensor) -> torch.Tensor:
    return output.flatten(2)


def _by_head(output: torch.Tensor) -> torch.Tensor:
    return output.transpose(1, 2).flatten(2)


def _fused(output: torch.Tensor, *, groups: int, start: int, end: int) -> torch.Tensor:
    return output.unflatten(2, (groups, -1))[..., start:end].flatten(2)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal up to rounding and a positive factor."""
    if one.shape != other.shape:
        return False
    left, right = one.double().flatten(), other.double().flatten().to(one.device)
    return bool(torch.nn.functional.cosine_similarity(left, right, dim=0) > 1 - SAME)
