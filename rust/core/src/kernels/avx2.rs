//! AVX2 with FMA and F16C: two registers make a logical vector.

use std::arch::x86_64::*;

use super::simd::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn split(low: __m256, high: __m256) -> [__m256; 2] {
    // SAFETY: the caller vouches for the CPU.
    unsafe {
        let even = _mm256_castps_pd(_mm256_shuffle_ps::<0b10_00_10_00>(low, high));
        let odd = _mm256_castps_pd(_mm256_shuffle_ps::<0b11_01_11_01>(low, high));
        let even = _mm256_permute4x64_pd::<0b11_01_10_00>(even);
        let odd = _mm256_permute4x64_pd::<0b11_01_10_00>(odd);
        [_mm256_castpd_ps(even), _mm256_castpd_ps(odd)]
    }
}

/// # Safety
/// The CPU has AVX.
#[inline(always)]
pub(super) unsafe fn sums(values: [__m256; 4]) -> [f32; 4] {
    // SAFETY: the caller vouches for the CPU.
    unsafe {
        let mut quarters = [_mm_setzero_ps(); 4];
        for (quarter, value) in quarters.iter_mut().zip(values) {
            *quarter = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps::<1>(value));
        }
        let [a, b, c, d] = quarters;
        let ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
        let cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
        let sum = _mm_add_ps(_mm_shuffle_ps::<0b10_00_10_00>(ab, cd), _mm_shuffle_ps::<0b11_01_11_01>(ab, cd));
        let mut result = [0.0; 4];
        _mm_storeu_ps(result.as_mut_ptr(), sum);
        result
    }
}

impl Simd for Avx2 {
    type Register = __m256;
    const WIDTH: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: the caller vouches for the CPU.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(pointer: *const f32) -> __m256 {
        // SAFETY: the caller vouches for the CPU and the pointer.
        unsafe { _mm256_load_ps(pointer) }
    }

    #[inline(always)]
    unsafe fn store(pointer: *mut f32, value: __m256) {
        // SAFETY: the caller vouches for the CPU and the pointer.
        unsafe { _mm256_store_ps(pointer, value) }
    }

    #[inline(always)]
    unsafe fn splat(pointer: *const f32) -> __m256 {
        // SAFETY: the caller vouches for the CPU and the pointer.
        unsafe { _mm256_set1_ps(*pointer) }
    }

    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the caller vouches for the CPU.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn subtract(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the caller vouches for the CPU.
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the caller vouches for the CPU.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn split_f32(pointer: *const u8) -> [__m256; 2] {
        // SAFETY: the caller vouches for the CPU and for 16 values at the pointer.
        unsafe { split(_mm256_loadu_ps(pointer.cast()), _mm256_loadu_ps(pointer.add(32).cast())) }
    }

    #[inline(always)]
    unsafe fn split_bf16(pointer: *const u8) -> [__m256; 2] {
        // SAFETY: the caller vouches for the CPU and for 16 values at the pointer.
        unsafe {
            let pairs = _mm256_loadu_si256(pointer.cast());
            let even = _mm256_slli_epi32::<16>(pairs);
            let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
            [_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd)]
        }
    }

    #[inline(always)]
    unsafe fn split_f16(pointer: *const u8) -> [__m256; 2] {
        // SAFETY: the caller vouches for the CPU and for 16 values at the pointer.
        unsafe {
            let low = _mm256_cvtph_ps(_mm_loadu_si128(pointer.cast()));
            let high = _mm256_cvtph_ps(_mm_loadu_si128(pointer.add(16).cast()));
            split(low, high)
        }
    }

    #[inline(always)]
    unsafe fn join([even, odd]: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: the caller vouches for the CPU.
        unsafe {
            let low = _mm256_unpacklo_ps(even, odd);
            let high = _mm256_unpackhi_ps(even, odd);
            [_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high)]
        }
    }

    #[inline(always)]
    unsafe fn sums(values: [__m256; 4]) -> [f32; 4] {
        // SAFETY: the caller vouches for the CPU.
        unsafe { sums(values) }
    }
}
