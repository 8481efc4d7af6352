"""Projection of full fine-tunes: a whole model in, a whole model out, shard by shard."""
