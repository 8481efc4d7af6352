"""Whether a linear weight is kept (out, in), as by nn.Linear, or (in, out), as by the Conv1D of transformers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Models whose transformers code keeps these modules as Conv1D, that is (in, out).
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}
# Names that say (out, in) where shapes do not tell: of nn.Linear, as far as anybody has called a Conv1D so.
LINEAR = re.compile(
    r"lin(ear)?\d*|\w*(proj|dense|fc|query|key|value|qkv|head)\d*|[wW]\w*|score|classifier|(gate|up|down|out|in)\d*"
)


def kept_in_out(
    leaf: str, stored: Sequence[int], shape: tuple[int, int] | None, model_type: object, *, fan_in_fan_out: bool
) -> bool | None:
    """Whether a weight is kept (in, out); None where nothing tells.

    The kind of model or the shapes tell, for a square the name too. PEFT's `fan_in_fan_out` is that of the module that it
    adapted last, so it tells of no module by itself.

    Args:
        leaf: the last component of the module's name.
        stored: the shape on disk.
        shape: (out, in) as the adapter's factors tell; None without an adapter.
        model_type: of the checkpoint's configuration.
        fan_in_fan_out: of the adapter's configuration.
    """
    named_so = leaf in CONV1D_MODULES
    if model_type in CONV1D_MODELS:
        return named_so
    square = len(stored) == 2 and stored[0] == stored[1]
    called_so = "conv1d" in leaf.lower()
    if shape is not None and not square:
        return tuple(stored) == shape[::-1] and (fan_in_fan_out or model_type is None)
    if shape is None and not called_so:
        return False
    if fan_in_fan_out and (named_so or called_so):
        return True
    of_linear = LINEAR.fullmatch(leaf) is not None and not named_so
    of_transformers = model_type is not None and not called_so
    if (of_linear and not fan_in_fan_out) or (of_transformers and (of_linear or not fan_in_fan_out)):
        return False
    return None
