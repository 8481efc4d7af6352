"""Fine-tuning by recipe: one checked YAML file for model, data, LoRA, trainer, defenses and output."""

from __future__ import annotations
