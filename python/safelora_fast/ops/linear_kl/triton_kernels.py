"""Triton kernel of KL and cross-entropy over rows of logits, in float32.

A row is read twice and its gradient written once. The first pass works tile by tile and keeps sums centered on the
running mean of δ = z − z₀ under the reference q, so nothing cancels while student and reference are close (algebra:
torch_impl.py). With f(x) = eˣ − 1 − x, moving the center of N = Σ q·f and A = Σ q·x·(eˣ − 1) by s, where Σ q·x = 0,
gives e⁻ˢ·N + q·f(−s) and e⁻ˢ·(A − s·N) − q·s·(e⁻ˢ − 1).
"""

import triton
import triton.language as tl


@triton.jit
def _excess(x):
    """eˣ − 1 − x without cancellation."""
    near = tl.where(tl.abs(x) < 1, x, 0)
    series = near * (1 / 39916800) + 1 / 3628800
    series = series * near + 1 / 362880
    series = series * near + 1 / 40320
    series = series * near + 1 / 5040
    series = series * near + 1 / 720
    series = series * near + 1 / 120
    series = series * near + 1 / 24
    series = series * near + 1 / 6
    series = series * near + 1 / 2
    return tl.where(tl.abs(x) < 1, series * near * near, tl.exp(x) - 1 - x)


@triton.jit
def _expm1(x):
    return x + _excess(x)


@triton.jit
def _log1p(x):
    """log(1 + x) for x ≥ 0, accurate to the last digits even for small x."""
    one_more = 1 + x
    return tl.where(one_more == 1, x, tl.log(one_more) * (x / tl.where(one_more == 1, 1, one_more - 1)))


@triton.jit
def _tanh(x):
    fall = _expm1(-2 * tl.abs(x))
    size = -fall / (2 + fall)
    return tl.where(x < 0, -size, size)


@triton.jit
def _tanh_of_logit(x):
    """Return tanh with an absolute error of one rounding, in half the steps: enough for a logit, not for a difference."""
    return 1 - 2 / (1 + tl.exp(2 * x))


@triton.jit
def _logits(raw, delta, bias, column, inside, scale, softcap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """The reference's logits, the student's difference from them, and its slope with respect to delta."""
    reference = tl.load(raw + column, mask=inside, other=0.0).to(tl.float32)
    distance = tl.load(delta + column, mask=inside, other=0.0).to(tl.float32) * scale
    if HAS_BIAS:
        reference += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    reference *= scale
    slope = tl.zeros_like(reference) + scale
    if CAPPED:
        student = _tanh_of_logit((reference + distance) / softcap)
        reference = _tanh_of_logit(reference / softcap)
        distance = softcap * _tanh(distance / softcap) * (1 - reference * student)
        reference *= softcap
        slope *= 1 - student * student
    return tl.where(inside, reference, float("-inf")), distance, slope


@triton.jit
def _recentered(excess, moved, weight, shift):
    """(N, A) after moving the center by `shift`."""
    shrink = tl.exp(-shift)
    return (
        shrink * excess + weight * _excess(-shift),
        shrink * (moved - shift * excess) - weight * shift * _expm1(-shift),
    )


@triton.jit(do_not_specialize=["rows"])
def linear_loss(
    raw,
    delta,
    bias,
    divergence_factor,
    labels,
    label_factor,
    figures,
    rows,
    vocabulary,
    raw_stride,
    delta_stride,
    scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    TEMPERED: tl.constexpr,
    FORWARD: tl.constexpr,
    LABELED: tl.constexpr,
    TILE: tl.constexpr,
):
    """KL, negative log-likelihood, entropy and top-1 hit of a row; overwrites delta with the gradient.

    Grid: rows. figures: [4, rows] float32: divergence, nll, entropy, and whether the label is the top prediction.
    """
    row = tl.program_id(0).to(tl.int64)
    raw += row * raw_stride
    delta += row * delta_stride
    label = tl.load(labels + row) if LABELED else 0
    # Largest logits start above −∞, because −∞ − (−∞) is NaN.
    # Reference: largest logit, Σ e^(z₀ − largest), mean of δ, and N and A times that sum.
    q_max, q_sum, mean, excess, moved = -3e38, 0.0, 0.0, 0.0, 0.0
    # Student, over the temperature: largest logit, Σ e^(z − largest) and Σ e^(z − largest)·δ.
    p_max, p_sum, p_moved = -3e38, 0.0, 0.0
    # Student without temperature: largest, Σ e^(z − largest), Σ e^(z − largest)·(z − largest), top class, label.
    z_max, z_sum, z_spread, first, of_label = -3e38, 0.0, 0.0, 0, 0.0
    farthest = 0.0
    for start in range(0, vocabulary, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < vocabulary
        reference, distance, _ = _logits(raw, delta, bias, column, inside, scale, softcap, HAS_BIAS, CAPPED)
        if LABELED:
            student = reference + distance
            largest = tl.maximum(z_max, tl.max(student))
            first = tl.where(largest > z_max, tl.min(tl.where(student == largest, column, vocabulary)), first)
            shrink = tl.exp(z_max - largest)
            z_spread = shrink * (z_spread + (z_max - largest) * z_sum)
            share = tl.exp(student - largest)
            z_sum = z_sum * shrink + tl.sum(share)
            z_spread += tl.sum(tl.where(share > 0, share * (student - largest), 0.0))
            z_max = largest
            of_label += tl.sum(tl.where(column == label, student, 0.0))
        if TEMPERED:
            reference /= temperature
            distance /= temperature
        student = reference + distance
        largest = tl.maximum(p_max, tl.max(student))
        shrink = tl.exp(p_max - largest)
        share = tl.exp(student - largest)
        p_sum = p_sum * shrink + tl.sum(share)
        p_moved = p_moved * shrink + tl.sum(share * distance)
        p_max = largest

        tile_max = tl.maximum(tl.max(reference), -3e38)
        share = tl.exp(reference - tile_max)
        tile_sum = tl.sum(share)
        tile_mean = tl.sum(share * distance) / tl.where(tile_sum == 0, 1.0, tile_sum)
        x = tl.where(inside, distance - tile_mean, 0.0)
        farthest = tl.maximum(farthest, tl.max(x))
        beyond = _excess(tl.minimum(x, 60.0))
        tile_excess = tl.sum(share * beyond)
        tile_moved = tl.sum(share * x * (x + beyond))
        largest = tl.maximum(q_max, tile_max)
        shrink, tile_shrink = tl.exp(q_max - largest), tl.exp(tile_max - largest)
        both = q_sum * shrink + tile_sum * tile_shrink
        gap = tl.where(q_sum > 0, tile_mean - mean, 0.0)
        shift = tl.where(both == 0, 0.0, gap * (tile_sum * tile_shrink / both))
        tile_shift = shift - gap
        mean = tl.where(q_sum > 0, mean + shift, tile_mean)
        farthest = tl.maximum(farthest, tl.abs(gap))
        excess, moved = _recentered(excess, moved, q_sum, shift)
        tile_excess, tile_moved = _recentered(tile_excess, tile_moved, tile_sum, tile_shift)
        excess = shrink * excess + tile_shrink * tile_excess
        moved = shrink * moved + tile_shrink * tile_moved
        q_max, q_sum = largest, both

    excess /= q_sum
    is_near = (farthest < 60) & (excess < 1e20)
    log_norm = tl.where(is_near, _log1p(excess), p_max + tl.log(p_sum) - q_max - tl.log(q_sum) - mean)
    reverse = tl.where(is_near, moved / q_sum / (1 + excess), p_moved / p_sum - mean) - log_norm
    tl.store(figures + row, log_norm if FORWARD else reverse)
    of_divergence = tl.load(divergence_factor + row).to(tl.float32)
    weight = 0.0
    if TEMPERED:
        of_divergence /= temperature
    if LABELED:
        weight = tl.load(label_factor + row).to(tl.float32)
        tl.store(figures + rows + row, tl.log(z_sum) + (z_max - of_label))
        tl.store(figures + 2 * rows + row, tl.log(z_sum) - z_spread / z_sum)
        tl.store(figures + 3 * rows + row, (first == label).to(tl.float32))

    for start in range(0, vocabulary, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < vocabulary
        reference, distance, slope = _logits(raw, delta, bias, column, inside, scale, softcap, HAS_BIAS, CAPPED)
        whole = reference + distance
        if TEMPERED:
            reference /= temperature
            distance /= temperature
        p = tl.exp(reference + distance - p_max) / p_sum
        x = distance - mean - log_norm
        if FORWARD:
            q = tl.exp(reference - q_max) / q_sum
            gradient = of_divergence * tl.where(tl.abs(x) < 1, q * _expm1(tl.where(tl.abs(x) < 1, x, 0.0)), p - q)
        else:
            gradient = of_divergence * p * (x - reverse)
        if LABELED:
            if TEMPERED:
                p = tl.exp(whole - z_max) / z_sum
            gradient += weight * (p - (column == label).to(tl.float32))
        tl.store(delta + column, (gradient * slope).to(delta.dtype.element_ty), mask=inside)
