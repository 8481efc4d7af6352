"""Read checkpoints and adapters: locate files, pair tensors by name, and determine how weights are oriented."""
