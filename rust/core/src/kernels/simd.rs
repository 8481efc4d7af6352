//! The vector operations that the micro kernels use.
//!
//! Columns are processed in groups of 32. A staged group is *split*: its even columns fill one vector of 16 lanes and
//! its odd columns the next, because that is how a pair of bfloat16 is extracted from a 32-bit lane. Every level and
//! every dtype uses this layout, so sums run in the same order everywhere.

/// Lanes of the logical vector: one AVX-512 register, two AVX2 registers.
pub(crate) const LANES: usize = 16;
/// Columns that are split together.
pub(crate) const GROUP: usize = 2 * LANES;

/// Sixteen lanes on one cache line: the unit of the workspace.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [f32; LANES]);

impl Line {
    pub(super) const ZERO: Self = Self([0.0; LANES]);
}

/// Vector operations of one SIMD level.
///
/// # Safety
/// For every function: the CPU has the level's instructions, and pointers are valid for the lanes that they cover.
/// Results agree bit for bit between levels, except NaN payloads.
pub(crate) trait Simd: Copy + 'static {
    /// `WIDTH` lanes of f32.
    type Register: Copy;
    /// `WIDTH` lanes of f64.
    type Wide: Copy;
    /// 8 or 16.
    const WIDTH: usize;

    unsafe fn zero() -> Self::Register;
    /// Loads `WIDTH` lanes from a pointer aligned to them.
    unsafe fn load(pointer: *const f32) -> Self::Register;
    /// Stores `WIDTH` lanes to a pointer aligned to them.
    unsafe fn store(pointer: *mut f32, value: Self::Register);
    /// One value in every lane.
    unsafe fn splat(pointer: *const f32) -> Self::Register;
    unsafe fn add(a: Self::Register, b: Self::Register) -> Self::Register;
    unsafe fn subtract(a: Self::Register, b: Self::Register) -> Self::Register;
    /// `a·b + c`, rounded once.
    unsafe fn multiply_add(a: Self::Register, b: Self::Register, c: Self::Register) -> Self::Register;
    /// The even and the odd elements of `2·WIDTH` unaligned values.
    unsafe fn split_f32(pointer: *const u8) -> [Self::Register; 2];
    /// The even and the odd elements of `2·WIDTH` unaligned values.
    unsafe fn split_bf16(pointer: *const u8) -> [Self::Register; 2];
    /// The even and the odd elements of `2·WIDTH` unaligned values.
    unsafe fn split_f16(pointer: *const u8) -> [Self::Register; 2];
    /// Inverse of `split`.
    unsafe fn join(split: [Self::Register; 2]) -> [Self::Register; 2];
    /// The sum over the lanes of each of four registers. Lanes are added as a tree: l and l + 8 (if there are 16), then
    /// l + 4, l + 2, l + 1.
    unsafe fn sums(values: [Self::Register; 4]) -> [f32; 4];

    unsafe fn wide_zero() -> Self::Wide;
    unsafe fn widen(value: Self::Register) -> Self::Wide;
    /// `a·b + c` of widened a and b. Their product is exact, so the result is rounded once, fused or not.
    unsafe fn wide_multiply_add(a: Self::Wide, b: Self::Wide, c: Self::Wide) -> Self::Wide;
    unsafe fn wide_add(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    /// The sum over the lanes, in the order of `sums`.
    unsafe fn wide_sum(value: Self::Wide) -> f64;
    unsafe fn multiply(a: Self::Register, b: Self::Register) -> Self::Register;
    /// The lanes of a part (`WIDTH` of 16) of the first and the second half of 32 unaligned values.
    unsafe fn load_f32(group: *const u8, part: usize) -> [Self::Register; 2];
    /// `load_f32` for binary16.
    unsafe fn load_f16(group: *const u8, part: usize) -> [Self::Register; 2];
    /// Inverse of `load_f32`. With `STREAM` the stores bypass the caches, and the group is aligned to 64 bytes.
    unsafe fn store_f32<const STREAM: bool>(group: *mut u8, part: usize, halves: [Self::Register; 2]);
    /// Inverse of `load_f16`, rounding to nearest even; streams like `store_f32`.
    unsafe fn store_f16<const STREAM: bool>(group: *mut u8, part: usize, halves: [Self::Register; 2]);
    /// Inverse of `split_bf16` for the part's pairs, rounding to nearest even; streams like `store_f32`.
    unsafe fn store_bf16<const STREAM: bool>(group: *mut u8, part: usize, split: [Self::Register; 2]);
    /// Orders stores made with `STREAM` before all later stores.
    unsafe fn fence();
}

/// Prefetches a cache line into L2; any address is allowed.
#[inline(always)]
pub(crate) fn prefetch(pointer: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetching has no architectural effect, whatever the address; SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(pointer.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = pointer;
}
