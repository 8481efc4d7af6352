"""Checks that the model was wrapped and sharded before defenses were attached to it, not after."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING

from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import is_parallel
from safelora_fast.models.distributed import world_size
from safelora_fast.models.shards import is_sharded

if TYPE_CHECKING:
    from torch import nn


ZERO_STAGES = (1, 2)  # of DeepSpeed


class Placement:
    """The parameters of a model at the time when defenses are attached to it.

    FSDP2 replaces sharded parameters by gathered ones at any time, so parameters of such models are not compared.

    Raises:
        SettingsError: DeepSpeed partitions the parameters, or its engine has another stage than 1 and 2.
    """

    def __init__(self, model: nn.Module) -> None:
        _check_zero_stage(model)
        self._model = model
        self._parameters = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
        self._checked = is_sharded(model)

    def check(self) -> None:
        """Before the first pass, check that the model still has the same parameters.

        Raises:
            SettingsError: names the first parameter that was replaced.
        """
        if self._checked:
            return
        now = dict(self._model.named_parameters())
        for name, parameter in self._parameters.items():
            if name not in now or now[name] is not parameter():
                raise SettingsError(
                    f"{name} is another parameter than when defend() was called: shard or wrap the model (fully_shard, "
                    "FullyShardedDataParallel, accelerator.prepare) and make the optimizer first, then call defend()"
                )
        self._checked = True


def _check_zero_stage(model: nn.Module) -> None:
    """Raise SettingsError for a stage of DeepSpeed in which weights that a defense reads are empty, or writes are lost."""
    advice = "use ZeRO stage 1 or 2, DistributedDataParallel, or FSDP2"
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_shape"):
            raise SettingsError(
                f"DeepSpeed partitions {name} (ZeRO stage 3), so a defense would read an empty tensor: {advice}"
            )
    stage = getattr(model, "zero_optimization_stage", None)
    if callable(stage) and stage() not in ZERO_STAGES:
        raise SettingsError(f"DeepSpeed's engine has ZeRO stage {stage()}, in which defenses were not tested: {advice}")


def check_gradients_are_shared(model: nn.Module) -> None:
    """Check that gradients are averaged over processes: the model must have been wrapped before defend().

    Raises:
        SettingsError: it was wrapped afterwards or not at all; the message gives the right order of calls.
    """
    if is_parallel(model) or (world_size() == 1 and "deepspeed" not in sys.modules):
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if world_size() > 1 and not any(hasattr(parameter, "placements") for parameter in parameters):
        raise SettingsError(
            f"{world_size()} processes train, but defend() was given a model that is not wrapped, so their gradients would "
            "never be averaged: first DistributedDataParallel, accelerator.prepare or fully_shard, then defend() with the "
            "model that it gives; where you average gradients yourself, use recording() and regularizer()"
        )
    if any(getattr(parameter, "_hp_mapping", None) is not None for parameter in parameters):
        raise SettingsError(
            "DeepSpeed was initialized after defend(), and its engine would not see these losses: first "
            "deepspeed.initialize, then defend() with the engine"
        )
