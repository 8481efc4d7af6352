"""Operations on torch tensors, for people who embed them. Importing this package imports torch.

Each function has the name of the folder that holds it, so all are imported here, at once: a later import of such a
folder then finds the function in its place.
"""

from safelora_fast.ops.subspace_projection import subspace_projection

__all__ = ["subspace_projection"]
