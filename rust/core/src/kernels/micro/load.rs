//! Loads of elements of V, split into even and odd columns.

use super::Dtype;
use crate::kernels::simd::{LANES, Line, Simd};

#[inline(always)]
pub(super) unsafe fn load_split<S: Simd>(pointer: *const u8, dtype: Dtype) -> [S::Register; 2] {
    // SAFETY: the contract of `Kernels` guarantees the CPU and the pointer.
    unsafe {
        match dtype {
            Dtype::F32 => S::split_f32(pointer),
            Dtype::Bf16 => S::split_bf16(pointer),
            Dtype::F16 => S::split_f16(pointer),
        }
    }
}

/// Calls `$body!(aligned dtype, base dtype)` with both dtypes as compile-time constants.
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
pub(super) use for_dtypes;

#[inline(always)]
pub(super) unsafe fn stage<S: Simd>(pointers: [*const u8; 2], dtypes: [Dtype; 2], groups: usize, staged: *mut Line) {
    // SAFETY: the contract of `Kernels` guarantees the CPU and all three shapes.
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
