//! Vᵀ·x, a few rows of V at a time: lanes are columns.

use super::load::{for_dtypes, load_split};
use super::{Corner, Dtype};
use crate::kernels::simd::{GROUP, LANES, Line, Simd, prefetch};

/// Prefetch distance of `update`, in groups of 32 columns.
const AHEAD: usize = 32;

/// Prefetches R rows of the group of 32 columns that is `AHEAD` groups after `group`, in a range of `groups` groups
/// that starts at `corner` and continues at `next`.
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
pub(super) unsafe fn update<S: Simd, const R: usize>(
    aligned: Corner,
    base: Corner,
    next: [*const u8; 2],
    groups: usize,
    x: *const f32,
    rank: usize,
    sums: *mut Line,
) {
    // SAFETY: the contract of `Kernels` guarantees the CPU and all shapes.
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
