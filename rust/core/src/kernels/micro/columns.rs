//! Vᵀ·x on a tile of columns: lanes are columns. A tile of V is staged in f32 once, and then multiplied by a few vectors
//! at a time, whose sums stay in registers over all rows of the tile.

use super::load::{for_dtypes, load_split};
use super::{AheadOfRows, Corner, Dtype, TILE};
use crate::kernels::simd::{GROUP, LANES, Line, Simd, prefetch};

#[inline(always)]
pub(super) unsafe fn stage_columns<S: Simd, const G: usize>(
    aligned: Corner,
    base: Corner,
    rows: usize,
    staged: *mut Line,
    squares: *mut Line,
    first: bool,
) {
    // SAFETY: the contract of `Kernels` guarantees the CPU and all shapes.
    unsafe {
        macro_rules! body {
            ($aligned:expr, $base:expr) => {
                for part in 0..LANES / S::WIDTH {
                    let squares = squares.cast::<f32>().add(part * S::WIDTH);
                    let mut sums = [[S::zero(); 2]; G];
                    for group in 0..G {
                        for half in 0..2 {
                            if !first {
                                sums[group][half] = S::load(squares.add(group * GROUP + half * LANES));
                            }
                        }
                    }
                    for row in 0..rows {
                        let a = aligned.pointer.add(row * aligned.row_step);
                        let b = base.pointer.add(row * base.row_step);
                        let staged = staged.add(row * TILE * 2).cast::<f32>().add(part * S::WIDTH);
                        for group in 0..G {
                            let column = group * GROUP + 2 * part * S::WIDTH;
                            let a = load_split::<S>(a.add(column * $aligned.size()), $aligned);
                            let b = load_split::<S>(b.add(column * $base.size()), $base);
                            for half in 0..2 {
                                let v = S::subtract(a[half], b[half]);
                                S::store(staged.add(group * GROUP + half * LANES), v);
                                sums[group][half] = S::multiply_add(v, v, sums[group][half]);
                            }
                        }
                    }
                    for group in 0..G {
                        for half in 0..2 {
                            S::store(squares.add(group * GROUP + half * LANES), sums[group][half]);
                        }
                    }
                }
            };
        }
        for_dtypes!(aligned.dtype, base.dtype, body);
    }
}

#[inline(always)]
pub(super) unsafe fn accumulate<S: Simd, const K: usize, const C: usize>(
    staged: *const Line,
    rows: usize,
    x: *const f32,
    sums: *mut Line,
    first: bool,
    ahead: [AheadOfRows; 2],
) {
    // SAFETY: the contract of `Kernels` guarantees the CPU and all shapes.
    unsafe {
        for start in (0..TILE * GROUP).step_by(C * S::WIDTH) {
            let sums = sums.cast::<f32>().add(start);
            let mut accumulators = [[S::zero(); C]; K];
            if !first {
                for k in 0..K {
                    for c in 0..C {
                        accumulators[k][c] = S::load(sums.add(k * TILE * GROUP + c * S::WIDTH));
                    }
                }
            }
            let mut v = staged.cast::<f32>().add(start);
            let mut x = x;
            for row in 0..rows {
                if start == 0 {
                    for matrix in ahead {
                        for line in 0..matrix.lines {
                            prefetch(matrix.pointer.wrapping_add(row * matrix.row_step + line * 64));
                        }
                    }
                }
                let mut values = [S::zero(); C];
                for c in 0..C {
                    values[c] = S::load(v.add(c * S::WIDTH));
                }
                for k in 0..K {
                    let factor = S::splat(x.add(k));
                    for c in 0..C {
                        accumulators[k][c] = S::multiply_add(values[c], factor, accumulators[k][c]);
                    }
                }
                v = v.add(TILE * GROUP);
                x = x.add(K);
            }
            for k in 0..K {
                for c in 0..C {
                    S::store(sums.add(k * TILE * GROUP + c * S::WIDTH), accumulators[k][c]);
                }
            }
        }
    }
}
