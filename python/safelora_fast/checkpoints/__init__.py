"""Everything that finds V: where checkpoints lie, which tensors pair, how weights are oriented; and adapters on disk."""
