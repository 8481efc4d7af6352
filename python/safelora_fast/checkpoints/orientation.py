"""Determine whether a weight is stored (out, in), as in nn.Linear, or (in, out), as in Conv1D and some experts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from safelora_fast.errors import PairingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.checkpoints.pairing import TensorNames

# Models whose transformers code uses Conv1D for these modules.
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}
# Names that no Conv1D has. They decide where the shapes do not.
LINEAR = re.compile(
    r"lin(ear)?\d*|\w*(proj|dense|fc|query|key|value|qkv|head)\d*|[wW]\w*|score|classifier|(gate|up|down|out|in)\d*"
)
# Models whose experts are stored (in, out). Since 0.19, PEFT recognizes those that declare `is_transposed`.
DECLARED = {"aria", "aria_text", "gpt_oss", "openai_privacy_filter"}
EXPERTS_IN_OUT = DECLARED | {"llama4", "llama4_text"}
READS_HIDDEN = {"gate_up_proj", "gate_proj", "up_proj"}
WRITES_HIDDEN = {"down_proj"}


def linear_in_out(
    names: TensorNames,
    tensor: str,
    stored: Sequence[int],
    module: str,
    shape: tuple[int, int] | None,
    *,
    fan_in_fan_out: bool,
) -> bool:
    """Return whether a linear weight is stored (in, out).

    The model type or the shapes decide; for a square weight, the module's name too. PEFT sets `fan_in_fan_out` for the
    module that it adapted last, so this setting alone decides nothing.

    Args:
        names: the tensor names of the checkpoint.
        tensor: the name of the weight.
        stored: the shape of the weight on disk.
        module: the name of the module.
        shape: (out, in) from the adapter; None without an adapter.
        fan_in_fan_out: `fan_in_fan_out` in the adapter's configuration.

    Raises:
        PairingError: the orientation cannot be determined.
    """
    leaf, model_type = module.rpartition(".")[2], names.setting("model_type")
    of_conv1d, called_so = leaf in CONV1D_MODULES, "conv1d" in leaf.lower()
    if model_type in CONV1D_MODELS:
        return of_conv1d
    if shape is not None and not (len(stored) == 2 and stored[0] == stored[1]):
        return tuple(stored) == shape[::-1] and (fan_in_fan_out or model_type is None)
    if shape is None and not called_so:
        return False
    if fan_in_fan_out and (of_conv1d or called_so):
        return True
    of_linear = LINEAR.fullmatch(leaf) is not None and not of_conv1d
    of_transformers = model_type is not None and not called_so
    if (of_linear and not fan_in_fan_out) or (of_transformers and (of_linear or not fan_in_fan_out)):
        return False
    raise PairingError(
        f"{module}: neither its name nor config.json of the {names.role} model {names.checkpoint.description} tells "
        f"whether {tensor} {list(stored)} is kept (out, in), as by Linear, or (in, out), as by Conv1D"
    )


def experts_in_out(names: TensorNames, tensor: str, parameter: str, shape: tuple[int, int]) -> bool:
    """Return whether experts are stored (in, out), by the model's hidden size or its type.

    Args:
        names: the tensor names of the checkpoint.
        tensor: the tensor of all experts.
        parameter: the name of the parameter.
        shape: the shape of one expert on disk.

    Raises:
        PairingError: the orientation cannot be determined.
    """
    hidden, model_type = names.setting("hidden_size"), names.setting("model_type")
    if shape[0] != shape[1] and hidden in shape and parameter in READS_HIDDEN | WRITES_HIDDEN:
        return shape[0 if parameter in READS_HIDDEN else 1] == hidden  # type: ignore[no-any-return]
    if model_type is None:
        raise PairingError(
            f"{tensor}: nothing tells whether its experts are kept (out, in) or (in, out); put the {names.role} model's "
            f"config.json beside it ({names.checkpoint.description})"
        )
    return model_type in EXPERTS_IN_OUT
