"""Models in memory: loading, structure, captured hidden states, the reference pass, and generation."""
