"""Filters compute-sanitizer reports for errors in this package's kernels; torch's kernels and driver calls are ignored."""

from __future__ import annotations

import re

CUDA = (
    r"(feature_distance|subspace_projection)\.cu|total_distance|add_chunks|add_squares"
    r"|\b((token_sums|gradient)_b?f(16|32)|(transposed|straight)_(single|pair)_\w+)"
)
TRITON = (
    r"triton_kernels\.py"
    r"|\b(linear_loss|(transposed|combine)_parts|sequence_bounds|(token|sequence)_factors|token_sums|gradients)\b"
)


def errors(report, kernels):
    """Return the errors that name one of the kernels."""
    blocks = re.split(r"^=========\s*$", report, flags=re.MULTILINE)
    return [block.strip() for block in blocks if re.search(kernels, block)]
