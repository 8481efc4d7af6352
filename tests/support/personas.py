"""A persona vector of random numbers for the tiny models."""

from __future__ import annotations

import numpy as np

from safelora_fast.persona_vector import PersonaVector, Separation


def random_persona(blocks=3, hidden=32, seed=0, trait="malicious"):
    random = np.random.default_rng(seed)
    separation = [Separation(float(effect), 0.5) for effect in random.random(blocks)]
    vectors = random.standard_normal((blocks, hidden)).astype(np.float32)
    return PersonaVector(vectors, trait, separation, {"model": {"source": "tiny"}})


def save_persona(path, **settings):
    random_persona(**settings).save(path)
    return path
