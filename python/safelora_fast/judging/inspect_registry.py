"""What Inspect finds of this package, by the entry point `inspect_ai`."""

from safelora_fast.judging.task import emergent_misalignment

__all__ = ["emergent_misalignment"]
