"""LLaMA-Factory with defenses: `python -m safelora_fast.trainers.llamafactory train x.yaml [key=value …]`.

The file is LLaMA-Factory's own, with one more section:

```yaml
stage: sft
finetuning_type: lora
safelora_fast:
  defenses:
    kl: {weight: 0.1}
```

On several GPUs: `torchrun --nproc-per-node N -m safelora_fast.trainers.llamafactory train x.yaml`.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from llamafactory.train.sft import workflow
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from transformers import Trainer

from safelora_fast.configuration.yaml_document import read_document
from safelora_fast.errors import SafeLoraFastError, SettingsError
from safelora_fast.trainers.defense_settings import KEY, read_settings
from safelora_fast.trainers.transformers import DefendedMixin

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.trainers.defense_settings import DefenseSettings

USAGE = "usage: python -m safelora_fast.trainers.llamafactory train FILE.yaml [key=value …]"
OTHER_TRAINERS = ("use_mca", "use_hyper_parallel", "use_kt", "use_ray", "use_v1")


class DefendedSeq2SeqTrainer(DefendedMixin, CustomSeq2SeqTrainer):  # type: ignore[misc]
    """LLaMA-Factory's trainer for supervised fine-tuning with defenses."""

    def why_apart(self, owner: type) -> str | None:
        """Return why the task loss may not be plain: `CustomSeq2SeqTrainer.compute_loss` only adds a loss for ASFT."""
        if owner is not CustomSeq2SeqTrainer:
            return super().why_apart(owner)
        return "use_asft_loss adds a loss" if self.finetuning_args.use_asft_loss else super().why_apart(Trainer)


def train(path: str, overrides: Sequence[str] = ()) -> None:
    """Train as `llamafactory-cli train` does, with the defenses of the file's `safelora_fast:` section.

    Args:
        path: a YAML or JSON file.
        overrides: settings that replace those of the file, as "key=value".

    Raises:
        SettingsError: the section is missing or invalid, or another setting is not supported.
    """
    from llamafactory.train.tuner import run_exp
    from omegaconf import OmegaConf

    ours = [word for word in overrides if word.partition("=")[0].partition(".")[0] == KEY]
    settings = read_settings(path, key=KEY, overrides=ours)
    theirs = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_cli([w for w in overrides if w not in ours]))
    values: dict[str, Any] = OmegaConf.to_container(theirs)
    del values[KEY]
    check_compatible(values, path)
    former = workflow.CustomSeq2SeqTrainer
    workflow.CustomSeq2SeqTrainer = _with_settings(settings)
    try:
        run_exp(values)
    finally:
        workflow.CustomSeq2SeqTrainer = former


def check_compatible(values: Mapping[str, Any], path: str) -> None:
    """Check LLaMA-Factory's settings: its trainer for supervised fine-tuning is the one that gets defenses.

    Raises:
        SettingsError: names the setting that is not supported.
    """
    document = read_document(path, what="settings")
    if values.get("stage", "sft") != "sft":
        raise document.problem(("stage",), f"is {values['stage']}, and {KEY} is for sft: remove one of them")
    for name in OTHER_TRAINERS:
        if values.get(name) or os.environ.get(name.upper(), "").lower() in {"1", "true", "y", "yes"}:
            raise document.problem(
                (name,),
                f"trains without LLaMA-Factory's own trainer or in processes of its own, so {KEY} would have no effect",
            )


def _with_settings(settings: DefenseSettings) -> type[DefendedSeq2SeqTrainer]:
    class WithSettings(DefendedSeq2SeqTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.use_defenses(**settings.arguments())

    WithSettings.__name__ = DefendedSeq2SeqTrainer.__name__
    return WithSettings


def main(words: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        SettingsError: it is not `train FILE`, or LLaMA-Factory would start processes without defenses.
    """
    from llamafactory.extras.misc import get_device_count, is_env_enabled

    if len(words) < 2 or words[0] != "train":
        raise SettingsError(USAGE)
    if "LOCAL_RANK" not in os.environ and (get_device_count() > 1 or is_env_enabled("FORCE_TORCHRUN")):
        raise SettingsError(
            f"start one process for each device: torchrun --nproc-per-node {get_device_count()} -m "
            f"safelora_fast.trainers.llamafactory {' '.join(words)}; or set CUDA_VISIBLE_DEVICES to one"
        )
    train(words[1], words[2:])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SafeLoraFastError as error:
        sys.exit(f"error: {error}")
