"""Extraction of persona vectors from contrastive system prompts, the model's own responses, and their activations."""

from __future__ import annotations

from safelora_fast.persona.extract import extract_persona_vector
from safelora_fast.persona.responses import Request, Response
from safelora_fast.persona.trait import Pair, Trait, load_trait

__all__ = ["Pair", "Request", "Response", "Trait", "extract_persona_vector", "load_trait"]
