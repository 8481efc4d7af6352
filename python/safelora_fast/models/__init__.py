"""Models in memory: loading, anatomy, captured hidden states, the reference pass, generation."""
