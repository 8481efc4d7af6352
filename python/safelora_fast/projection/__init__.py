"""Projection of finished adapters, streamed from checkpoints on disk; no model is loaded and torch is not needed."""
