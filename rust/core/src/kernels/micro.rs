//! The micro kernels, written once over [`Simd`] and compiled for every level.
//!
//! `stage` forms a tile of V in f32, `accumulate` multiplies a staged tile from the left (lanes are columns), `dot`
//! multiplies it from the right (lanes take part in a reduction).

use super::simd::{GROUP, LANES, Line, Simd, prefetch};
use super::{Dtype, Scalar};

/// Independent chains of multiply-adds: they hide the latency of any CPU, and fit sixteen registers.
const CHAINS: usize = 12;
/// How far ahead `update` prefetches, in groups of 32 columns.
const AHEAD: usize = 32;
/// Rows that `update` and `dot` take together. More would lie in the same few sets of L1 where rows are a power of two long.
pub(super) const ROWS: usize = 4;

/// A corner of a stored matrix: unaligned rows that start `row_step` bytes apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Corner {
    pub(super) pointer: *const u8,
    pub(super) row_step: usize,
    pub(super) dtype: Dtype,
}

/// Lines that `dot` brings into L2: `per_vector` for each vector of 16 columns, taking [`ROWS`] rows in turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ahead {
    pub(super) pointer: *const u8,
    pub(super) row_step: usize,
    pub(super) per_vector: usize,
}

/// A band of rows of both weights, wherever they lie, and what to bring into L2 while reading it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Band {
    pub(super) rows: [[*const u8; ROWS]; 2],
    pub(super) dtypes: [Dtype; 2],
    pub(super) ahead: [Corner; 2],
    /// Whether base is brought in too, or aligned alone.
    pub(super) ahead_of_base: bool,
}

/// The micro kernels of one level.
///
/// # Safety
/// Of every function: the CPU has the level's instructions, and pointers are valid for the shapes given.
pub(super) trait Kernels: Simd {
    /// Most vectors that one call of `dot` takes.
    const DOT: usize;
    /// Most vectors that one call of `dot_band` takes.
    const DOT_BAND: usize;

    /// Stages `groups`·32 elements of aligned − base of one row.
    unsafe fn stage(pointers: [*const u8; 2], dtypes: [Dtype; 2], groups: usize, staged: *mut Line);

    /// `sums[group][0] += Σ_row v²` and `sums[group][1 + k] += Σ_row x[k][row]·v[row]` for R rows (1 or `ROWS`) of `groups`·32 columns of
    /// aligned − base and `rank` vectors.
    unsafe fn update<const R: usize>(
        aligned: Corner,
        base: Corner,
        next: [*const u8; 2],
        groups: usize,
        x: *const f32,
        rank: usize,
        sums: *mut Line,
    );

    /// What `dot` does, of a band that is read from memory, and stored as (vector, row, lane) unless `staged` is null.
    unsafe fn dot_band<const K: usize>(
        band: Band,
        x: *const f32,
        vectors: usize,
        sums: *mut f32,
        first: bool,
        staged: *mut Line,
    );

    /// `sums[k][row] = Σ_vector Σ_lane v[vector][row]·x[vector][k]` for four rows, added to what `sums` held unless `first`.
    /// `x` is aligned as a line.
    unsafe fn dot<const K: usize>(
        v: *const Line,
        x: *const f32,
        vectors: usize,
        sums: *mut f32,
        first: bool,
        ahead: Ahead,
    );

    /// `steps` multiply-adds in registers only, for each of [`CHAINS`] registers.
    unsafe fn chains(steps: usize) -> [Self::Register; CHAINS];

    /// Splits `groups`·32 unaligned f32 values; group `g` goes to `output + g·group_step`, its odd half `odd_step` further.
    unsafe fn split(values: *const f32, groups: usize, output: *mut f32, odd_step: usize, group_step: usize);

    /// Adds a split group of 32 to unaligned values.
    unsafe fn add_joined(split: *const Line, output: *mut f32);
}

#[inline(always)]
unsafe fn load_split<S: Simd>(pointer: *const u8, dtype: Dtype) -> [S::Register; 2] {
    // SAFETY: the caller vouches for the CPU and the pointer.
    unsafe {
        match dtype {
            Dtype::F32 => S::split_f32(pointer),
            Dtype::Bf16 => S::split_bf16(pointer),
            Dtype::F16 => S::split_f16(pointer),
        }
    }
}

/// Calls `$body!(aligned dtype, base dtype)` with both dtypes known to the compiler.
macro_rules! for_dtypes {
    ($aligned:expr, $base:expr, $call:ident) => {
        match ($aligned, $base) {
            (Dtype::Bf16, Dtype::Bf16) => $call!(Dtype::Bf16, Dtype::Bf16),
            (Dtype::Bf16, Dtype::F16) => $call!(Dtype::Bf16, Dtype::F16),
            (Dtype::Bf16, Dtype::F32) => $call!(Dtype::Bf16, Dtype::F32),
            (Dtype::F16, Dtype::Bf16) => $call!(Dtype::F16, Dtype::Bf16),
            (Dtype::F16, Dtype::F16) => $call!(Dtype::F16, Dtype::F16),
            (Dtype::F16, Dtype::F32) => $call!(Dtype::F16, Dtype::F32),
            (Dtype::F32, Dtype::Bf16) => $call!(Dtype::F32, Dtype::Bf16),
            (Dtype::F32, Dtype::F16) => $call!(Dtype::F32, Dtype::F16),
            (Dtype::F32, Dtype::F32) => $call!(Dtype::F32, Dtype::F32),
        }
    };
}

#[inline(always)]
unsafe fn stage<S: Simd>(pointers: [*const u8; 2], dtypes: [Dtype; 2], groups: usize, staged: *mut Line) {
    // SAFETY: the caller vouches for the CPU and for all three shapes.
    unsafe {
        let [aligned, base] = dtypes;
        for part in 0..groups * LANES / S::WIDTH {
            let [a_even, a_odd] = load_split::<S>(pointers[0].add(2 * part * S::WIDTH * aligned.size()), aligned);
            let [b_even, b_odd] = load_split::<S>(pointers[1].add(2 * part * S::WIDTH * base.size()), base);
            let (group, lane) = (part * S::WIDTH / LANES, part * S::WIDTH % LANES);
            let output = staged.add(2 * group).cast::<f32>().add(lane);
            S::store(output, S::subtract(a_even, b_even));
            S::store(output.add(LANES), S::subtract(a_odd, b_odd));
        }
    }
}

/// Prefetches R rows of the group of 32 columns that lies `AHEAD` groups after `group` in a stretch of `groups` from `corner`
/// on, continued at `next`.
#[inline(always)]
fn prefetch_rows<const R: usize>(corner: Corner, next: *const u8, size: usize, group: usize, groups: usize) {
    let target = group + AHEAD;
    let (start, target) =
        if target < groups { (corner.pointer, target) } else { (next, (target - groups).min(groups - 1)) };
    for row in 0..R {
        for line in 0..size / 2 {
            prefetch(start.wrapping_add(row * corner.row_step + target * GROUP * size + line * 64));
        }
    }
}

#[inline(always)]
unsafe fn update<S: Simd, const R: usize>(
    aligned: Corner,
    base: Corner,
    next: [*const u8; 2],
    groups: usize,
    x: *const f32,
    rank: usize,
    sums: *mut Line,
) {
    // SAFETY: the caller vouches for the CPU and for all shapes.
    unsafe {
        macro_rules! body {
            ($aligned:expr, $base:expr) => {
                for group in 0..groups {
                    prefetch_rows::<R>(aligned, next[0], $aligned.size(), group, groups);
                    prefetch_rows::<R>(base, next[1], $base.size(), group, groups);
                    for part in 0..LANES / S::WIDTH {
                        let column = group * GROUP + 2 * part * S::WIDTH;
                        let mut v = [[S::zero(); 2]; R];
                        for row in 0..R {
                            let a = aligned.pointer.add(row * aligned.row_step + column * $aligned.size());
                            let b = base.pointer.add(row * base.row_step + column * $base.size());
                            let [a_even, a_odd] = load_split::<S>(a, $aligned);
                            let [b_even, b_odd] = load_split::<S>(b, $base);
                            v[row] = [S::subtract(a_even, b_even), S::subtract(a_odd, b_odd)];
                        }
                        let sum = sums.add(group * 2 * (1 + rank)).cast::<f32>().add(part * S::WIDTH);
                        let mut squares = [S::load(sum), S::load(sum.add(LANES))];
                        for row in 0..R {
                            for half in 0..2 {
                                squares[half] = S::multiply_add(v[row][half], v[row][half], squares[half]);
                            }
                        }
                        S::store(sum, squares[0]);
                        S::store(sum.add(LANES), squares[1]);
                        for k in 0..rank {
                            let sum = sum.add((1 + k) * GROUP);
                            let mut values = [S::load(sum), S::load(sum.add(LANES))];
                            for row in 0..R {
                                let factor = S::splat(x.add(k * R + row));
                                for half in 0..2 {
                                    values[half] = S::multiply_add(v[row][half], factor, values[half]);
                                }
                            }
                            S::store(sum, values[0]);
                            S::store(sum.add(LANES), values[1]);
                        }
                    }
                }
            };
        }
        for_dtypes!(aligned.dtype, base.dtype, body);
    }
}

#[inline(always)]
unsafe fn dot_band<S: Simd, const K: usize>(
    band: Band,
    x: *const f32,
    vectors: usize,
    sums: *mut f32,
    first: bool,
    staged: *mut Line,
) {
    // SAFETY: the caller vouches for the CPU and for all shapes.
    unsafe {
        let mut totals = [[S::zero(); ROWS]; K];
        macro_rules! body {
            ($aligned:expr, $base:expr) => {
                for part in 0..LANES / S::WIDTH {
                    let mut accumulators = [[S::zero(); ROWS]; K];
                    for group in 0..vectors / 2 {
                        let column = group * GROUP + 2 * part * S::WIDTH;
                        if part == 0 {
                            prefetch_group(band.ahead[0], $aligned.size(), group);
                            if band.ahead_of_base {
                                prefetch_group(band.ahead[1], $base.size(), group);
                            }
                        }
                        let mut v = [[S::zero(); ROWS]; 2];
                        for row in 0..ROWS {
                            let a = load_split::<S>(band.rows[0][row].add(column * $aligned.size()), $aligned);
                            let b = load_split::<S>(band.rows[1][row].add(column * $base.size()), $base);
                            for half in 0..2 {
                                v[half][row] = S::subtract(a[half], b[half]);
                            }
                        }
                        for half in 0..2 {
                            let vector = 2 * group + half;
                            if !staged.is_null() {
                                for row in 0..ROWS {
                                    let line = staged.add(vector * ROWS + row).cast::<f32>();
                                    S::store(line.add(part * S::WIDTH), v[half][row]);
                                }
                            }
                            for k in 0..K {
                                let factor = S::load(x.add((vector * K + k) * LANES + part * S::WIDTH));
                                for row in 0..ROWS {
                                    let sum = accumulators[k][row];
                                    accumulators[k][row] = S::multiply_add(v[half][row], factor, sum);
                                }
                            }
                        }
                    }
                    for k in 0..K {
                        for row in 0..ROWS {
                            let value = accumulators[k][row];
                            totals[k][row] = if part == 0 { value } else { S::add(totals[k][row], value) };
                        }
                    }
                }
            };
        }
        for_dtypes!(band.dtypes[0], band.dtypes[1], body);
        add_sums::<S, K>(totals, sums, first);
    }
}

/// Prefetches a band's rows of a group of 32 columns.
#[inline(always)]
fn prefetch_group(corner: Corner, size: usize, group: usize) {
    for row in 0..ROWS {
        for line in 0..size / 2 {
            prefetch(corner.pointer.wrapping_add(row * corner.row_step + group * GROUP * size + line * 64));
        }
    }
}

/// Adds up the lanes of every total and puts or adds them to `sums`.
#[inline(always)]
unsafe fn add_sums<S: Simd, const K: usize>(totals: [[S::Register; ROWS]; K], sums: *mut f32, first: bool) {
    for k in 0..K {
        // SAFETY: the caller vouches for the CPU and for K times four sums.
        unsafe {
            let values = S::sums(totals[k]);
            for row in 0..ROWS {
                let sum = &mut *sums.add(k * ROWS + row);
                *sum = if first { values[row] } else { *sum + values[row] };
            }
        }
    }
}

#[inline(always)]
unsafe fn dot<S: Simd, const K: usize>(
    v: *const Line,
    x: *const f32,
    vectors: usize,
    sums: *mut f32,
    first: bool,
    ahead: Ahead,
) {
    // SAFETY: the caller vouches for the CPU and for all three shapes.
    unsafe {
        let mut totals = [[S::zero(); ROWS]; K];
        for part in 0..LANES / S::WIDTH {
            let mut accumulators = [[S::zero(); ROWS]; K];
            let mut v = v.cast::<f32>().add(part * S::WIDTH);
            let mut x = x.add(part * S::WIDTH);
            for vector in 0..vectors {
                if part == 0 {
                    for line in vector * ahead.per_vector..(vector + 1) * ahead.per_vector {
                        prefetch(ahead.pointer.wrapping_add(line % ROWS * ahead.row_step + line / ROWS * 64));
                    }
                }
                let mut factors = [S::zero(); K];
                for k in 0..K {
                    factors[k] = S::load(x.add(k * LANES));
                }
                for row in 0..ROWS {
                    let value = S::load(v.add(row * LANES));
                    for k in 0..K {
                        accumulators[k][row] = S::multiply_add(value, factors[k], accumulators[k][row]);
                    }
                }
                v = v.add(ROWS * LANES);
                x = x.add(K * LANES);
            }
            for k in 0..K {
                for row in 0..ROWS {
                    let value = accumulators[k][row];
                    totals[k][row] = if part == 0 { value } else { S::add(totals[k][row], value) };
                }
            }
        }
        add_sums::<S, K>(totals, sums, first);
    }
}

#[inline(always)]
unsafe fn split<S: Simd>(values: *const f32, groups: usize, output: *mut f32, odd_step: usize, group_step: usize) {
    // SAFETY: the caller vouches for the CPU and for both shapes.
    unsafe {
        for group in 0..groups {
            for part in 0..LANES / S::WIDTH {
                let [even, odd] = S::split_f32(values.add(group * GROUP + 2 * part * S::WIDTH).cast());
                let output = output.add(group * group_step + part * S::WIDTH);
                S::store(output, even);
                S::store(output.add(odd_step), odd);
            }
        }
    }
}

#[inline(always)]
unsafe fn add_joined<S: Simd>(split: *const Line, output: *mut f32) {
    // SAFETY: the caller vouches for the CPU and for both shapes.
    unsafe {
        let mut joined = [Line::ZERO; 2];
        for part in 0..LANES / S::WIDTH {
            let even = split.cast::<f32>().add(part * S::WIDTH);
            let [low, high] = S::join([S::load(even), S::load(even.add(LANES))]);
            let target = joined.as_mut_ptr().cast::<f32>().add(2 * part * S::WIDTH);
            S::store(target, low);
            S::store(target.add(S::WIDTH), high);
        }
        for (lane, value) in joined.iter().flat_map(|line| line.0).enumerate() {
            *output.add(lane) += value;
        }
    }
}

#[inline(always)]
unsafe fn chains<S: Simd>(steps: usize) -> [S::Register; CHAINS] {
    // SAFETY: the caller vouches for the CPU; both constants outlive the calls.
    unsafe {
        let (factor, addend) = (S::splat(&std::hint::black_box(0.5)), S::splat(&std::hint::black_box(1.0)));
        let mut chains = [addend; CHAINS];
        for _ in 0..steps {
            for chain in 0..CHAINS {
                chains[chain] = S::multiply_add(chains[chain], factor, addend);
            }
        }
        chains
    }
}

/// Runs `steps` fused multiply-adds in each lane of independent chains, on registers only; returns the number of lanes.
pub(super) fn fused_chains<L: Kernels>(steps: usize) -> usize {
    // SAFETY: the caller has checked the level.
    std::hint::black_box(unsafe { L::chains(steps) });
    CHAINS * L::WIDTH
}

/// Compiles the micro kernels with a level's instructions.
macro_rules! kernels {
    ($level:ty, dot: $dot:literal, dot_band: $dot_band:literal $(, #[$feature:meta])?) => {
        impl Kernels for $level {
            const DOT: usize = $dot;
            const DOT_BAND: usize = $dot_band;

            $(#[$feature])?
            unsafe fn stage(pointers: [*const u8; 2], dtypes: [Dtype; 2], groups: usize, staged: *mut Line) {
                // SAFETY: passed on to the caller.
                unsafe { stage::<Self>(pointers, dtypes, groups, staged) }
            }

            $(#[$feature])?
            unsafe fn dot_band<const K: usize>(
                band: Band,
                x: *const f32,
                vectors: usize,
                sums: *mut f32,
                first: bool,
                staged: *mut Line,
            ) {
                // SAFETY: passed on to the caller.
                unsafe { dot_band::<Self, K>(band, x, vectors, sums, first, staged) }
            }

            $(#[$feature])?
            unsafe fn update<const R: usize>(
                aligned: Corner,
                base: Corner,
                next: [*const u8; 2],
                groups: usize,
                x: *const f32,
                rank: usize,
                sums: *mut Line,
            ) {
                // SAFETY: passed on to the caller.
                unsafe { update::<Self, R>(aligned, base, next, groups, x, rank, sums) }
            }

            $(#[$feature])?
            unsafe fn dot<const K: usize>(
                v: *const Line,
                x: *const f32,
                vectors: usize,
                sums: *mut f32,
                first: bool,
                ahead: Ahead,
            ) {
                // SAFETY: passed on to the caller.
                unsafe { dot::<Self, K>(v, x, vectors, sums, first, ahead) }
            }

            $(#[$feature])?
            unsafe fn chains(steps: usize) -> [Self::Register; CHAINS] {
                // SAFETY: passed on to the caller.
                unsafe { chains::<Self>(steps) }
            }

            $(#[$feature])?
            unsafe fn split(
                values: *const f32,
                groups: usize,
                output: *mut f32,
                odd_step: usize,
                group_step: usize,
            ) {
                // SAFETY: passed on to the caller.
                unsafe { split::<Self>(values, groups, output, odd_step, group_step) }
            }

            $(#[$feature])?
            unsafe fn add_joined(split: *const Line, output: *mut f32) {
                // SAFETY: passed on to the caller.
                unsafe { add_joined::<Self>(split, output) }
            }
        }
    };
}

kernels!(Scalar, dot: 3, dot_band: 1);
#[cfg(target_arch = "x86_64")]
kernels!(super::Avx2, dot: 3, dot_band: 1, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
kernels!(super::Avx512, dot: 6, dot_band: 4, #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]);

/// Calls a micro kernel whose number of vectors is a constant of the type.
macro_rules! with_constant {
    ($count:expr, $level:ident :: $kernel:ident, [$($constant:literal)+], $arguments:tt) => {
        match $count {
            $($constant => $level::$kernel::<$constant> $arguments,)+
            count => unreachable!("no micro kernel for {count} vectors"),
        }
    };
}
pub(super) use with_constant;

/// Cuts `rank` vectors into tiles, as few and as even as can be: the first of at most `first`, the others of at most `most`.
/// Gives the (start, count) of each.
pub(super) fn tiles(rank: usize, first: usize, most: usize) -> impl Iterator<Item = (usize, usize)> + Clone {
    let others = rank.saturating_sub(first).div_ceil(most);
    let first = first.min(rank.div_ceil(others + 1));
    let rest = rank - first;
    let edge = move |tile: usize| match tile {
        0 => 0,
        _ if others == 0 => first,
        _ => first + (tile - 1) * (rest / others) + (tile - 1).min(rest % others),
    };
    (0..=others).map(move |tile| (edge(tile), edge(tile + 1) - edge(tile)))
}

#[cfg(test)]
mod tests {
    use super::tiles;

    #[test]
    fn tiles_cover_every_vector_once() {
        for (first, most) in [(4, 6), (1, 3)] {
            for rank in 1..700 {
                let mut next = 0;
                for (index, (start, count)) in tiles(rank, first, most).enumerate() {
                    assert_eq!(start, next);
                    assert!((1..=if index == 0 { first } else { most }).contains(&count), "{count} of {rank}");
                    next += count;
                }
                assert_eq!(next, rank);
            }
        }
    }
}
