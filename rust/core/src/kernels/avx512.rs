//! AVX-512: a register is a logical vector.

use std::arch::x86_64::*;

use super::simd::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Avx512;

/// Lane numbers for `_mm512_permutex2var_ps`; 16 and above take from the second operand.
const EVEN: [i32; 16] = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30];
const ODD: [i32; 16] = [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31];
const LOW: [i32; 16] = [0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23];
const HIGH: [i32; 16] = [8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31];

/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn permute(a: __m512, b: __m512, lanes: &[i32; 16]) -> __m512 {
    // SAFETY: the caller vouches for the CPU; `lanes` holds one register.
    unsafe { _mm512_permutex2var_ps(a, _mm512_loadu_epi32(lanes.as_ptr()), b) }
}

impl Simd for Avx512 {
    type Register = __m512;
    const WIDTH: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller vouches for the CPU.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(pointer: *const f32) -> __m512 {
        // SAFETY: the caller vouches for the CPU and the pointer.
        unsafe { _mm512_load_ps(pointer) }
    }

    #[inline(always)]
    unsafe fn store(pointer: *mut f32, value: __m512) {
        // SAFETY: the caller vouches for the CPU and the pointer.
        unsafe { _mm512_store_ps(pointer, value) }
    }

    #[inline(always)]
    unsafe fn splat(pointer: *const f32) -> __m512 {
        // SAFETY: the caller vouches for the CPU and the pointer.
        unsafe { _mm512_set1_ps(*pointer) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller vouches for the CPU.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn subtract(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller vouches for the CPU.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the caller vouches for the CPU.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn split_f32(pointer: *const u8) -> [__m512; 2] {
        // SAFETY: the caller vouches for the CPU and for 32 values at the pointer.
        unsafe {
            let low = _mm512_loadu_ps(pointer.cast());
            let high = _mm512_loadu_ps(pointer.add(64).cast());
            [permute(low, high, &EVEN), permute(low, high, &ODD)]
        }
    }

    #[inline(always)]
    unsafe fn split_bf16(pointer: *const u8) -> [__m512; 2] {
        // SAFETY: the caller vouches for the CPU and for 32 values at the pointer.
        unsafe {
            let pairs = _mm512_loadu_si512(pointer.cast());
            let even = _mm512_slli_epi32::<16>(pairs);
            let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
            [_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)]
        }
    }

    #[inline(always)]
    unsafe fn split_f16(pointer: *const u8) -> [__m512; 2] {
        // SAFETY: the caller vouches for the CPU and for 32 values at the pointer.
        unsafe {
            let low = _mm512_cvtph_ps(_mm256_loadu_si256(pointer.cast()));
            let high = _mm512_cvtph_ps(_mm256_loadu_si256(pointer.add(32).cast()));
            [permute(low, high, &EVEN), permute(low, high, &ODD)]
        }
    }

    #[inline(always)]
    unsafe fn join([even, odd]: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: the caller vouches for the CPU.
        unsafe { [permute(even, odd, &LOW), permute(even, odd, &HIGH)] }
    }

    #[inline(always)]
    unsafe fn sums(values: [__m512; 4]) -> [f32; 4] {
        // SAFETY: the caller vouches for the CPU, and AVX-512 implies AVX.
        unsafe {
            let mut halves = [_mm256_setzero_ps(); 4];
            for (half, value) in halves.iter_mut().zip(values) {
                *half = _mm256_add_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps::<1>(value));
            }
            super::avx2::sums(halves)
        }
    }
}
