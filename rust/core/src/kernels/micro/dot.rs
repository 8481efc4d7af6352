//! V·x, four rows of V at a time; the sum over the columns runs across lanes.

use super::load::{for_dtypes, load_split};
use super::{Ahead, Band, Corner, Dtype, ROWS};
use crate::kernels::simd::{GROUP, LANES, Line, Simd, prefetch};

#[inline(always)]
pub(super) unsafe fn dot_band<S: Simd, const K: usize>(
    band: Band,
    x: *const f32,
    vectors: usize,
    sums: *mut f32,
    first: bool,
    staged: *mut Line,
) {
    // SAFETY: the contract of `Kernels` guarantees the CPU and all shapes.
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

/// Adds up the lanes of every total, and stores them in `sums` or adds them to it.
#[inline(always)]
unsafe fn add_sums<S: Simd, const K: usize>(totals: [[S::Register; ROWS]; K], sums: *mut f32, first: bool) {
    for k in 0..K {
        // SAFETY: the contract of this function guarantees the CPU and K times four sums.
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
pub(super) unsafe fn dot<S: Simd, const K: usize>(
    v: *const Line,
    x: *const f32,
    vectors: usize,
    sums: *mut f32,
    first: bool,
    ahead: Ahead,
) {
    // SAFETY: the contract of `Kernels` guarantees the CPU and all three shapes.
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
