"""Projection of trained adapters: streams checkpoints from disk without loading a model or importing torch."""
