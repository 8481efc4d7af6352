"""Defenses in axolotl: a plugin that reads `safelora_fast:` in axolotl's YAML file, and the trainer that it chooses.

```yaml
plugins: [safelora_fast.trainers.axolotl.SafeLoraFastPlugin]   # not needed where this package is installed with pip
safelora_fast:
  defenses:
    kl: {weight: 0.1}
```

`trainer_cls: safelora_fast.trainers.axolotl.DefendedAxolotlTrainer` does the same without a plugin.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import Trainer

from safelora_fast.errors import SettingsError
from safelora_fast.trainers.defense_settings import KEY, read_settings
from safelora_fast.trainers.transformers import DefendedMixin

if TYPE_CHECKING:
    from collections.abc import Mapping

TRAINER_CLS = "trainer_cls"
OTHER_LOSSES = ("rl", "reward_model", "process_reward_model", "diffusion_lm")  # settings with trainers of their own
DROPS_MASK = ("gemma3", "gemma4", "gemma4_unified")  # compute_loss removes the mask of packed rows
SPLIT = ("context_parallel_size", "tensor_parallel_size", "expert_parallel_size")


class DefendedAxolotlTrainer(DefendedMixin, AxolotlTrainer):  # type: ignore[misc]
    """AxolotlTrainer with the defenses of `safelora_fast:` in the file that axolotl was started with.

    Raises:
        SettingsError: the file has no such section, or it is invalid; see also
            :class:`~safelora_fast.trainers.transformers.DefendedMixin`.
    """

    def post_set_axolotl_cfg(self) -> None:
        """Read the settings: axolotl hands them over after it has constructed the trainer."""
        super().post_set_axolotl_cfg()
        check_compatible(self.axolotl_cfg)
        self.use_defenses(**read_settings(self.axolotl_cfg.axolotl_config_path, key=KEY).arguments())

    def why_apart(self, owner: type) -> str | None:
        """Return why the task loss may not be plain cross-entropy: `AxolotlTrainer.compute_loss` leaves most as they are."""
        if owner is not AxolotlTrainer:
            return super().why_apart(owner)
        if self.args.orpo_alpha:
            return "orpo_alpha adds a loss"
        if self._inject_mm_token_type_ids or (self.args.sample_packing and self._model_type in DROPS_MASK):
            return f"axolotl changes the batches of {self._model_type}"
        return super().why_apart(Trainer)


class SafeLoraFastArguments(BaseModel):
    """The key that axolotl's own check of its file must accept; :func:`read_settings` checks what is in it."""

    safelora_fast: dict[str, Any] | None = None


class SafeLoraFastPlugin(BasePlugin):  # type: ignore[misc]
    """Chooses :class:`DefendedAxolotlTrainer` for files with a `safelora_fast:` section; does nothing for others."""

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the section before anything heavy is loaded, and set `trainer_cls`.

        Raises:
            SettingsError: it is invalid, or another setting needs another trainer.
        """
        if cfg.get(KEY) is None:
            return
        check_compatible(cfg)
        path = cfg["axolotl_config_path"]
        read_settings(path, key=KEY)
        if dict(cfg[KEY]) != yaml.safe_load(Path(path).read_text(encoding="utf-8"))[KEY]:
            raise SettingsError(f"{path}: {KEY}: axolotl was given other values than the file has: change the file")
        if cfg.get(TRAINER_CLS) is None:
            cfg[TRAINER_CLS] = f"{DefendedAxolotlTrainer.__module__}.{DefendedAxolotlTrainer.__name__}"

    def get_input_args(self) -> str:
        """Return the class with the plugin's keys."""
        return f"{SafeLoraFastArguments.__module__}.{SafeLoraFastArguments.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Check that axolotl has made a trainer with defenses.

        Raises:
            SettingsError: another plugin, or `trainer_cls`, has chosen one without.
        """
        if cfg.get(KEY) is not None and not isinstance(trainer, DefendedAxolotlTrainer):
            raise SettingsError(
                f"{KEY}: {type(trainer).__name__} is trained with, which has no defenses: remove the plugin or {TRAINER_CLS} "
                f"that chose it, or derive it from {DefendedAxolotlTrainer.__name__}"
            )


def check_compatible(cfg: Mapping[str, Any]) -> None:
    """Raise SettingsError for a setting of axolotl that defenses do not support."""
    for name in OTHER_LOSSES:
        if cfg.get(name):
            raise SettingsError(
                f"{KEY}: defenses are for supervised fine-tuning, and {name} is set: remove one of them"
            )
    for name in SPLIT:
        if (cfg.get(name) or 1) > 1:
            raise SettingsError(f"{KEY}: {name} > 1 splits sequences or weights in ways that defenses do not support")
