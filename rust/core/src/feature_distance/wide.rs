//! What the distance needs of a level beyond the operations of the products: sums in f64, and writing.

use crate::kernels::Simd;

/// Vector operations of one SIMD level, as in [`Simd`], for `WIDTH` lanes at a time.
///
/// # Safety
/// Of every function: the CPU has the level's instructions, and pointers are valid for what they are said to cover.
/// Results agree bit for bit between levels, NaN payloads aside.
pub(super) trait Wide: Simd {
    /// `WIDTH` lanes of f64.
    type Wide: Copy;

    unsafe fn wide_zero() -> Self::Wide;
    unsafe fn widen(value: Self::Register) -> Self::Wide;
    /// `a·b + c` of widened a and b, whose product is exact: it is rounded once, fused or not.
    unsafe fn wide_multiply_add(a: Self::Wide, b: Self::Wide, c: Self::Wide) -> Self::Wide;
    unsafe fn wide_add(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    /// The sum over the lanes, in the order of `sums`: lane l plus lane l + 8 (where there are 16), then l + 4, l + 2, l + 1.
    unsafe fn wide_sum(value: Self::Wide) -> f64;
    unsafe fn multiply(a: Self::Register, b: Self::Register) -> Self::Register;
    /// The lanes of a part (`WIDTH` of 16) of the first and of the second half of 32 unaligned values.
    unsafe fn load_f32(group: *const u8, part: usize) -> [Self::Register; 2];
    /// The same of binary16.
    unsafe fn load_f16(group: *const u8, part: usize) -> [Self::Register; 2];
    /// Undoes `load_f32`. With `STREAM` the values go past the caches, to a group that is aligned to 64 bytes.
    unsafe fn store_f32<const STREAM: bool>(group: *mut u8, part: usize, halves: [Self::Register; 2]);
    /// Undoes `load_f16`, rounding to nearest even; streams as `store_f32` does.
    unsafe fn store_f16<const STREAM: bool>(group: *mut u8, part: usize, halves: [Self::Register; 2]);
    /// Undoes `split_bf16` of the part's pairs, rounding to nearest even; streams as `store_f32` does.
    unsafe fn store_bf16<const STREAM: bool>(group: *mut u8, part: usize, split: [Self::Register; 2]);
    /// Orders what was stored with `STREAM` before all later stores.
    unsafe fn fence();
}
