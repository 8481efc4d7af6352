//! The micro kernels, written once over [`Simd`] and compiled for every level.
//!
//! `update` and `accumulate` multiply V from the left (lanes are columns), `dot` and `dot_band` multiply it from the right
//! (lanes are part of the reduction). `stage` and `stage_columns` compute rows of V in f32.

mod chains;
mod columns;
mod dot;
mod layout;
mod load;
mod tiles;
mod update;

use super::Dtype;
use super::Scalar;
use super::simd::{Line, Simd};
use chains::chains;
use columns::{accumulate, stage_columns};
use dot::{dot, dot_band};
use layout::{add_joined, split};
use load::stage;
use update::update;

pub(super) use chains::fused_chains;
pub(super) use tiles::{tiles, with_constant};

/// Independent chains of multiply-adds: enough to hide the latency of any CPU, few enough for sixteen registers.
const CHAINS: usize = 12;
/// Rows that `update` and `dot` process together. If row lengths are powers of two, more rows would compete for the
/// same few L1 sets.
pub(super) const ROWS: usize = 4;
/// Groups of 32 columns in a tile of `accumulate`.
pub(super) const TILE: usize = 2;
/// Most vectors in one call of `accumulate`.
pub(super) const VECTORS: usize = 6;

/// A corner of a stored matrix: unaligned rows that start `row_step` bytes apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Corner {
    pub(super) pointer: *const u8,
    pub(super) row_step: usize,
    pub(super) dtype: Dtype,
}

/// Lines that `dot` prefetches into L2: `per_vector` for each vector of 16 columns, alternating between [`ROWS`] rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ahead {
    pub(super) pointer: *const u8,
    pub(super) row_step: usize,
    pub(super) per_vector: usize,
}

/// Rows that `accumulate` prefetches into L2: `lines` lines of each.
#[derive(Clone, Copy, Debug)]
pub(super) struct AheadOfRows {
    pub(super) pointer: *const u8,
    pub(super) row_step: usize,
    pub(super) lines: usize,
}

/// A band of rows of both weights, and what to prefetch into L2 while reading it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Band {
    pub(super) rows: [[*const u8; ROWS]; 2],
    pub(super) dtypes: [Dtype; 2],
    pub(super) ahead: [Corner; 2],
    /// Whether to prefetch base too, or only aligned.
    pub(super) ahead_of_base: bool,
}

/// The micro kernels of one level.
///
/// # Safety
/// For every function: the CPU has the level's instructions, and pointers are valid for the given shapes.
pub(super) trait Kernels: Simd {
    /// From this number of vectors on, `accumulate` is faster than `update`.
    const TILED: usize;
    /// Most vectors in one call of `dot`.
    const DOT: usize;
    /// Most vectors in one call of `dot_band`.
    const DOT_BAND: usize;

    /// Computes `groups`·32 elements of aligned − base of one row.
    unsafe fn stage(pointers: [*const u8; 2], dtypes: [Dtype; 2], groups: usize, staged: *mut Line);

    /// `sums[group][0] += Σ_row v²` and `sums[group][1 + k] += Σ_row x[k][row]·v[row]` for R rows (1 or `ROWS`) of
    /// `groups`·32 columns of aligned − base and `rank` vectors.
    unsafe fn update<const R: usize>(
        aligned: Corner,
        base: Corner,
        next: [*const u8; 2],
        groups: usize,
        x: *const f32,
        rank: usize,
        sums: *mut Line,
    );

    /// Stages `rows` rows of `G` groups of aligned − base as (row, line of the tile). Adds their squares to those of the
    /// columns, which start from zero if `first`.
    unsafe fn stage_columns<const G: usize>(
        aligned: Corner,
        base: Corner,
        rows: usize,
        staged: *mut Line,
        squares: *mut Line,
        first: bool,
    );

    /// `sums[k] += Σ_row x[row][k]·v[row]` for a staged tile of `rows` rows. The sums start from zero if `first`.
    unsafe fn accumulate<const K: usize>(
        staged: *const Line,
        rows: usize,
        x: *const f32,
        sums: *mut Line,
        first: bool,
        ahead: [AheadOfRows; 2],
    );

    /// `dot` on a band read from memory. Also stores the band as (vector, row, lane) unless `staged` is null.
    unsafe fn dot_band<const K: usize>(
        band: Band,
        x: *const f32,
        vectors: usize,
        sums: *mut f32,
        first: bool,
        staged: *mut Line,
    );

    /// `sums[k][row] = Σ_vector Σ_lane v[vector][row]·x[vector][k]` for four rows, added to `sums` unless `first`.
    /// `x` is aligned like a line.
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

    /// Splits `groups`·32 unaligned f32 values. Group `g` goes to `output + g·group_step`, its odd half to `odd_step`
    /// beyond.
    unsafe fn split(values: *const f32, groups: usize, output: *mut f32, odd_step: usize, group_step: usize);

    /// Adds a split group of 32 to unaligned values.
    unsafe fn add_joined(split: *const Line, output: *mut f32);
}

/// Compiles the micro kernels with a level's instructions.
macro_rules! kernels {
    ($level:ty, tiled: $tiled:literal, columns: $columns:literal, dot: $dot:literal, dot_band: $dot_band:literal $(, #[$feature:meta])?) => {
        impl Kernels for $level {
            const TILED: usize = $tiled;
            const DOT: usize = $dot;
            const DOT_BAND: usize = $dot_band;

            $(#[$feature])?
            unsafe fn stage(pointers: [*const u8; 2], dtypes: [Dtype; 2], groups: usize, staged: *mut Line) {
                // SAFETY: the contracts are the same.
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
                // SAFETY: the contracts are the same.
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
                // SAFETY: the contracts are the same.
                unsafe { update::<Self, R>(aligned, base, next, groups, x, rank, sums) }
            }

            $(#[$feature])?
            unsafe fn stage_columns<const G: usize>(
                aligned: Corner,
                base: Corner,
                rows: usize,
                staged: *mut Line,
                squares: *mut Line,
                first: bool,
            ) {
                // SAFETY: the contracts are the same.
                unsafe { stage_columns::<Self, G>(aligned, base, rows, staged, squares, first) }
            }

            $(#[$feature])?
            unsafe fn accumulate<const K: usize>(
                staged: *const Line,
                rows: usize,
                x: *const f32,
                sums: *mut Line,
                first: bool,
                ahead: [AheadOfRows; 2],
            ) {
                // SAFETY: the contracts are the same.
                unsafe { accumulate::<Self, K, $columns>(staged, rows, x, sums, first, ahead) }
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
                // SAFETY: the contracts are the same.
                unsafe { dot::<Self, K>(v, x, vectors, sums, first, ahead) }
            }

            $(#[$feature])?
            unsafe fn chains(steps: usize) -> [Self::Register; CHAINS] {
                // SAFETY: the contracts are the same.
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
                // SAFETY: the contracts are the same.
                unsafe { split::<Self>(values, groups, output, odd_step, group_step) }
            }

            $(#[$feature])?
            unsafe fn add_joined(split: *const Line, output: *mut f32) {
                // SAFETY: the contracts are the same.
                unsafe { add_joined::<Self>(split, output) }
            }
        }
    };
}

kernels!(Scalar, tiled: 8, columns: 1, dot: 3, dot_band: 1);
#[cfg(target_arch = "x86_64")]
kernels!(super::Avx2, tiled: 32, columns: 2, dot: 3, dot_band: 1, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
kernels!(super::Avx512, tiled: 8, columns: 4, dot: 6, dot_band: 4, #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]);
