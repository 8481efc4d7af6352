//! Stored element types. A level takes 32 neighbors as 2 × 16 lanes, in the order that is cheapest for the type: a sum may run
//! in any order, as long as it is the same on every level.

use crate::kernels::Dtype;
use crate::kernels::Simd;

/// How one part (`WIDTH` of the 16 lanes, twice) of a group of 32 elements is read and written.
///
/// # Safety
/// As [`Simd`].
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
        // SAFETY: passed on to the caller.
        unsafe { S::load_f32(group, part) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd, const STREAM: bool>(group: *mut u8, part: usize, values: [S::Register; 2]) {
        // SAFETY: passed on to the caller.
        unsafe { S::store_f32::<STREAM>(group, part, values) }
    }
}

impl Element for Bf16 {
    const DTYPE: Dtype = Dtype::Bf16;

    #[inline(always)]
    unsafe fn load<S: Simd>(group: *const u8, part: usize) -> [S::Register; 2] {
        // SAFETY: passed on to the caller; a part is `2·WIDTH` neighbors of two bytes.
        unsafe { S::split_bf16(group.add(part * 4 * S::WIDTH)) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd, const STREAM: bool>(group: *mut u8, part: usize, values: [S::Register; 2]) {
        // SAFETY: passed on to the caller.
        unsafe { S::store_bf16::<STREAM>(group, part, values) }
    }
}

impl Element for F16 {
    const DTYPE: Dtype = Dtype::F16;

    #[inline(always)]
    unsafe fn load<S: Simd>(group: *const u8, part: usize) -> [S::Register; 2] {
        // SAFETY: passed on to the caller.
        unsafe { S::load_f16(group, part) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd, const STREAM: bool>(group: *mut u8, part: usize, values: [S::Register; 2]) {
        // SAFETY: passed on to the caller.
        unsafe { S::store_f16::<STREAM>(group, part, values) }
    }
}
