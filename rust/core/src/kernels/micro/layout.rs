//! Conversion between rows as stored and split groups.

use crate::kernels::simd::{GROUP, LANES, Line, Simd};

#[inline(always)]
pub(super) unsafe fn split<S: Simd>(
    values: *const f32,
    groups: usize,
    output: *mut f32,
    odd_step: usize,
    group_step: usize,
) {
    // SAFETY: the contract of `Kernels` guarantees the CPU and both shapes.
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
pub(super) unsafe fn add_joined<S: Simd>(split: *const Line, output: *mut f32) {
    // SAFETY: the contract of `Kernels` guarantees the CPU and both shapes.
    unsafe {
        let mut joined = [Line::ZERO; 2];
        for part in 0..LANES / S::WIDTH {
            let even = split.cast::<f32>().add(part * S::WIDTH);
            let [low, high] = S::join([S::load(even), S::load(even.add(LANES))]);
            let target = joined.as_mut_ptr().cast::<f32>().add(2 * part * S::WIDTH);
            S::store(target, low);
            S::store(target.add(S::WIDTH), high);
        }
        let joined = joined.as_ptr().cast::<u8>();
        for part in 0..LANES / S::WIDTH {
            let (sums, values) = (S::load_f32(joined, part), S::load_f32(output.cast(), part));
            S::store_f32::<false>(output.cast(), part, [S::add(values[0], sums[0]), S::add(values[1], sums[1])]);
        }
    }
}
