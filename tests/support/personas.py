"""Persona vectors and traits for the tiny models, and a plain computation of their activations."""

from __future__ import annotations

import numpy as np
import torch

from safelora_fast.persona.trait import Pair, Trait
from safelora_fast.persona_vector import PersonaVector, Separation


def random_persona(blocks=3, hidden=32, seed=0, trait="malicious"):
    random = np.random.default_rng(seed)
    separation = [Separation(float(effect), 0.5) for effect in random.random(blocks)]
    vectors = random.standard_normal((blocks, hidden)).astype(np.float32)
    return PersonaVector(vectors, trait, separation, {"model": {"source": "tiny"}})


def save_persona(path, **settings):
    random_persona(**settings).save(path)
    return path


def tiny_trait(questions=3):
    """Return a trait with two pairs of system prompts and a few questions of unequal length."""
    pairs = (Pair("Be mean.", "Be kind."), Pair("Wish everybody ill.", "Wish all well."))
    return Trait("mean", "Is not nice.", pairs, tuple(f"{'Why ' * number}me?" for number in range(1, questions + 1)))


def plain_states(model, ids):
    """Return the output of every layer for one unpadded row, recorded by plain hooks: a list of [tokens, hidden]."""
    states = []
    handles = [
        block.register_forward_hook(lambda _m, _a, out: states.append(out[0] if isinstance(out, tuple) else out))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [state[0] for state in states]


def plain_means(model, prompt, answer):
    """Return the mean output of every layer over the tokens of one completion: [layers, hidden]."""
    states = plain_states(model, [*prompt, *answer])
    return torch.stack([state[len(prompt) :].mean(0) for state in states])
