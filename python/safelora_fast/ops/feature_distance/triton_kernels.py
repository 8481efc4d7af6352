"""Triton kernels of the feature distance.

Sums within a token are float32; sums over tokens are EXACT (float64 if the GPU supports it).

Layers come as a tuple of pointers. One launch covers all of them without a pointer table in memory, so a graph can
capture it. Inputs are upcast right after the load, because the interpreter cannot compute in bfloat16.

Rows, tokens, and the strides of masks change from batch to batch. They are not specialized, and tiles do not depend on
them, so that nothing is compiled in the middle of training.
"""

import triton
import triton.language as tl


@triton.jit
def _pick(pointers, index):
    """Select a pointer by an index known only at run time."""
    chosen = pointers[0]
    for place in tl.static_range(1, len(pointers)):
        chosen = tl.where(index == place, pointers[place], chosen)
    return chosen


@triton.jit(do_not_specialize=["rows", "tokens", "mask_row", "mask_token"])
def token_sums(
    features,
    references,
    mask,
    sums,
    rows,
    tokens,
    hidden,
    feature_strides,
    reference_strides,
    mask_row,
    mask_token,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """‖d‖², ⟨d, h₀⟩ and ‖h₀‖² of every token that counts, zeros for the others.

    Grid: (tiles of TOKENS tokens, layers). sums is [3, layers, batch rows · tokens].
    """
    layer = tl.program_id(1)
    flat = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row, token = flat // tokens, flat % tokens
    inside = flat < rows * tokens
    counts = tl.load(mask + row * mask_row + token * mask_token, mask=inside, other=0) != 0
    feature = _pick(features, layer) + row * feature_strides[0] + token * feature_strides[1]
    reference = _pick(references, layer) + row * reference_strides[0] + token * reference_strides[1]
    squared = tl.zeros([TOKENS, COLUMNS], tl.float32)
    dot = tl.zeros([TOKENS, COLUMNS], tl.float32)
    norm = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in range(0, hidden, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        wanted = counts[:, None] & (column < hidden)[None, :]
        column = column.to(tl.int64)
        h = tl.load(feature[:, None] + (column * feature_strides[2])[None, :], mask=wanted, other=0.0)
        h0 = tl.load(reference[:, None] + (column * reference_strides[2])[None, :], mask=wanted, other=0.0)
        h0 = h0.to(tl.float32)
        d = h.to(tl.float32) - h0
        squared += d * d
        dot += d * h0
        norm += h0 * h0
    place = sums + layer * rows * tokens + flat
    plane = tl.num_programs(1) * rows * tokens
    tl.store(place, tl.sum(squared, 1), mask=inside)
    tl.store(place + plane, tl.sum(dot, 1), mask=inside)
    tl.store(place + 2 * plane, tl.sum(norm, 1), mask=inside)


@triton.jit(do_not_specialize=["tokens", "mask_row", "mask_token", "segment_row", "segment_token"])
def sequence_bounds(
    mask, segments, first, last, tokens, mask_row, mask_token, segment_row, segment_token, TILE: tl.constexpr
):
    """The first and last token of each token's sequence: tokens of the same batch row that count and share its number.

    Grid: (tiles of tokens, batch rows). first, last: [rows, tokens] int32; (tokens, -1) for a token that does not
    count.
    """
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = token < tokens
    counts = tl.load(mask + row * mask_row + token * mask_token, mask=inside, other=0) != 0
    number = tl.load(segments + row * segment_row + token * segment_token, mask=inside, other=0)
    low = tl.full([TILE], 0, tl.int32) + tokens
    high = tl.full([TILE], -1, tl.int32)
    for start in range(0, tokens, TILE):
        other = start + tl.arange(0, TILE)
        there = other < tokens
        other_counts = tl.load(mask + row * mask_row + other * mask_token, mask=there, other=0) != 0
        other_number = tl.load(segments + row * segment_row + other * segment_token, mask=there, other=0)
        same = (number[:, None] == other_number[None, :]) & other_counts[None, :] & counts[:, None]
        low = tl.minimum(low, tl.min(tl.where(same, other[None, :], tokens), 1))
        high = tl.maximum(high, tl.max(tl.where(same, other[None, :], -1), 1))
    tl.store(first + row * tokens + token, low, mask=inside)
    tl.store(last + row * tokens + token, high, mask=inside)


@triton.jit
def _unit_distance(squared, dot, norm):
    """Distance between unit vectors, and the factors of d and h in its gradient (docs/methods-training.md).

    A zero vector has no direction: its unit vector is taken as zero, and so is its gradient.
    """
    q = tl.sqrt(norm)
    p_squared = norm + 2 * dot + squared
    p_squared = tl.where(p_squared < 0, 0, p_squared)  # keeps NaN
    p = tl.sqrt(p_squared)
    known = (p != 0) & ((q != 0) | (p != p))
    product = tl.where(known, p * q, 1)
    gap = tl.where(known, (2 * dot + squared) / tl.where(known, p + q, 1), 0)
    distance = tl.where(known, (squared - gap * gap) / product, (p != q).to(q.dtype))
    of_difference = tl.where(known, 2 / product, 0)
    of_features = of_difference * ((dot + squared) / tl.where(known, p_squared, 1))
    return distance, of_difference, of_features


@triton.jit(do_not_specialize=["rows", "tokens", "mask_row", "mask_token"])
def sequence_factors(
    sums,
    mask,
    first,
    last,
    distances,
    factors,
    rows,
    tokens,
    mask_row,
    mask_token,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Distance of every sequence, and the factors of its tokens, with the tokens added in a fixed order.

    Grid: (possible sequences per batch row, batch rows, layers). A PACKED row can have one sequence per token; the
    program of a sequence is that of its first token. distances: [layers, rows, possible sequences per row]. factors:
    [layers, rows, tokens, 2]; each token that counts is written once.
    """
    slot, row, layer = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = slot if PACKED else 0
    end = tl.load(last + row * tokens + slot) + 1 if PACKED else tokens
    if PACKED:  # the range is empty if this token is not the first of its sequence, or does not count
        end = tl.where(tl.load(first + row * tokens + slot) == slot, end, 0)
    plane = tl.num_programs(2) * rows * tokens
    place = (layer * rows + row) * tokens
    squared = tl.zeros([TILE], EXACT)
    dot = tl.zeros([TILE], EXACT)
    norm = tl.zeros([TILE], EXACT)
    for start in range(begin, end, TILE):
        token = start + tl.arange(0, TILE)
        wanted = token < end
        if PACKED:
            wanted = wanted & (tl.load(first + row * tokens + token, mask=wanted, other=-1) == slot)
        squared += tl.load(sums + place + token, mask=wanted, other=0).to(EXACT)
        dot += tl.load(sums + plane + place + token, mask=wanted, other=0).to(EXACT)
        norm += tl.load(sums + 2 * plane + place + token, mask=wanted, other=0).to(EXACT)
    distance, of_difference, of_features = _unit_distance(tl.sum(squared), tl.sum(dot), tl.sum(norm))
    tl.store(distances + (layer * rows + row) * tl.num_programs(0) + slot, distance)
    for start in range(begin, end, TILE):
        token = start + tl.arange(0, TILE)
        wanted = token < end
        counts = tl.load(mask + row * mask_row + token * mask_token, mask=wanted, other=0) != 0
        if PACKED:
            wanted = wanted & (tl.load(first + row * tokens + token, mask=wanted, other=-1) == slot)
        written = factors + 2 * (place + token)
        tl.store(written, tl.where(counts, of_difference, 0).to(factors.dtype.element_ty), mask=wanted)
        tl.store(written + 1, tl.where(counts, of_features, 0).to(factors.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["rows", "tokens", "mask_row", "mask_token"])
def token_factors(
    sums,
    mask,
    distances,
    factors,
    rows,
    tokens,
    mask_row,
    mask_token,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Distance and factors of every token on its own, scaled to UNIT length or unscaled.

    Grid: (tiles of tokens, batch rows, layers). distances: [layers, rows, tokens].
    """
    row, layer = tl.program_id(1).to(tl.int64), tl.program_id(2)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = token < tokens
    counts = tl.load(mask + row * mask_row + token * mask_token, mask=inside, other=0) != 0
    plane = tl.num_programs(2) * rows * tokens
    place = (layer * rows + row) * tokens + token
    squared = tl.load(sums + place, mask=inside, other=0).to(EXACT)
    if UNIT:
        dot = tl.load(sums + plane + place, mask=inside, other=0).to(EXACT)
        norm = tl.load(sums + 2 * plane + place, mask=inside, other=0).to(EXACT)
        distance, of_difference, of_features = _unit_distance(squared, dot, norm)
    else:
        distance, of_difference, of_features = squared, squared * 0 + 2, squared * 0
    tl.store(distances + place, tl.where(counts, distance, 0), mask=inside)
    written = factors + 2 * place
    tl.store(written, tl.where(counts, of_difference, 0).to(factors.dtype.element_ty), mask=inside)
    tl.store(written + 1, tl.where(counts, of_features, 0).to(factors.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tokens"])
def gradients(
    features,
    references,
    factors,
    weight,
    outputs,
    rows,
    tokens,
    hidden,
    feature_strides,
    reference_strides,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient of every token, weight · (a·(h − h₀) − b·h). If a is zero, writes zero and reads nothing.

    Grid: (tiles of TOKENS tokens, layers). factors: [layers, rows, tokens, 2]; outputs are contiguous.
    """
    layer = tl.program_id(1)
    flat = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row, token = flat // tokens, flat % tokens
    inside = flat < rows * tokens
    place = factors + 2 * (layer * rows * tokens + flat)
    of_difference = tl.load(place, mask=inside, other=0).to(tl.float32)
    of_features = tl.load(place + 1, mask=inside, other=0).to(tl.float32)
    counts = of_difference != 0
    scale = tl.load(weight).to(tl.float32)
    of_difference, of_features = (of_difference * scale)[:, None], (of_features * scale)[:, None]
    feature = _pick(features, layer) + row * feature_strides[0] + token * feature_strides[1]
    reference = _pick(references, layer) + row * reference_strides[0] + token * reference_strides[1]
    output = _pick(outputs, layer) + flat * hidden
    for start in range(0, hidden, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = (column < hidden)[None, :]
        wanted = counts[:, None] & there
        column = column.to(tl.int64)
        h = tl.load(feature[:, None] + (column * feature_strides[2])[None, :], mask=wanted, other=0.0)
        h0 = tl.load(reference[:, None] + (column * reference_strides[2])[None, :], mask=wanted, other=0.0)
        h = h.to(tl.float32)
        gradient = of_difference * (h - h0.to(tl.float32)) - of_features * h
        gradient = tl.where(counts[:, None], gradient, 0.0)
        tl.store(output[:, None] + column[None, :], gradient.to(output.dtype.element_ty), mask=inside[:, None] & there)
