"""Whether a weight is kept (out, in), as by nn.Linear, or (in, out), as by the Conv1D of transformers and by some experts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from safelora_fast.errors import PairingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.checkpoints.pairing import TensorNames

# Models whose transformers code keeps these modules as Conv1D.
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}
# Names that nobody has given to a Conv1D: they tell where shapes do not.
LINEAR = re.compile(
    r"lin(ear)?\d*|\w*(proj|dense|fc|query|key|value|qkv|head)\d*|[wW]\w*|score|classifier|(gate|up|down|out|in)\d*"
)
# Models whose experts are kept (in, out); PEFT knows those that declare it (`is_transposed`) since 0.19.
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
    """Whether a linear weight is kept (in, out).

    The kind of model or the shapes tell; for a square, the name too. PEFT's `fan_in_fan_out` is that of the module that it
    adapted last, so it tells nothing alone.

    Args:
        names: the checkpoint.
        tensor: the weight.
        stored: its shape on disk.
        module: the module's name.
        shape: (out, in) by the adapter; None without one.
        fan_in_fan_out: of the adapter's configuration.

    Raises:
        PairingError: nothing tells.
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
    """Whether experts are kept (in, out), by the model's hidden size or its type.

    Args:
        names: the checkpoint.
        tensor: the tensor of all experts.
        parameter: the parameter's name.
        shape: of one expert on disk.

    Raises:
        PairingError: nothing tells.
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
