//! Stored element types. A level reads 32 adjacent elements as 2 × 16 lanes, in the order that is cheapest for the
//! type. A sum may use any order, as long as all levels use the same.

use crate::kernels::Dtype;
use crate::kernels::Simd;

/// Reads and writes one part (`WIDTH` of the 16 lanes, twice) of a group of 32 elements.
///
/// # Safety
/// Same as [`Simd`].
pub(super) trait Element {
    const DTYPE: Dtype;

    unsafe fn load<S: Simd>(group: *const u8, part: usize) -> [S::Register; 2];
    unsafe fn store<S: Simd, const STREAM: bool>(group: *mut u8, part: usize, values: [S::Register; 2]);
}

/// Lane l is element l, and element 16 + l.
pub(super) struct F32;
/// Lane l is element 2·l, and element 2·l + 1.
pub(super) struct Bf16;
/// Lane l is element l, and element 16 + l.
pub(super) struct F16;

impl Element for F32 {
    const DTYPE: Dtype = Dtype::F32;

    #[inline(always)]
    unsafe fn load<S: Simd>(group: *const u8, part: usize) -> [S::Register; 2] {
        // SAFETY: the contracts are the same.
        unsafe { S::load_f32(group, part) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd, const STREAM: bool>(group: *mut u8, part: usize, values: [S::Register; 2]) {
        // SAFETY: the contracts are the same.
        unsafe { S::store_f32::<STREAM>(group, part, values) }
    }
}

impl Element for Bf16 {
    const DTYPE: Dtype = Dtype::Bf16;

    #[inline(always)]
    unsafe fn load<S: Simd>(group: *const u8, part: usize) -> [S::Register; 2] {
        // SAFETY: the contracts are the same; a part is `2·WIDTH` neighbors of two bytes.
        unsafe { S::split_bf16(group.add(part * 4 * S::WIDTH)) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd, const STREAM: bool>(group: *mut u8, part: usize, values: [S::Register; 2]) {
        // SAFETY: the contracts are the same.
        unsafe { S::store_bf16::<STREAM>(group, part, values) }
    }
}

impl Element for F16 {
    const DTYPE: Dtype = Dtype::F16;

    #[inline(always)]
    unsafe fn load<S: Simd>(group: *const u8, part: usize) -> [S::Register; 2] {
        // SAFETY: the contracts are the same.
        unsafe { S::load_f16(group, part) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd, const STREAM: bool>(group: *mut u8, part: usize, values: [S::Register; 2]) {
        // SAFETY: the contracts are the same.
        unsafe { S::store_f16::<STREAM>(group, part, values) }
    }
}
