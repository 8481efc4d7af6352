//! AVX2 with FMA and F16C: four registers of f64 make a logical vector.

use std::arch::x86_64::*;

use super::wide::Wide;
use crate::kernels::Avx2;

/// # Safety
/// The CPU has AVX, and 32 bytes at `pointer` may be written; with `STREAM` it is aligned to them.
#[inline(always)]
unsafe fn put<const STREAM: bool>(pointer: *mut u8, value: __m256i) {
    // SAFETY: the caller vouches for the CPU and the pointer; every trait function that streams leaves the fence to the caller.
    unsafe {
        if STREAM { _mm256_stream_si256(pointer.cast(), value) } else { _mm256_storeu_si256(pointer.cast(), value) }
    }
}

/// # Safety
/// The CPU has SSE2, and 16 bytes at `pointer` may be written; with `STREAM` it is aligned to them.
#[inline(always)]
unsafe fn put_half<const STREAM: bool>(pointer: *mut u8, value: __m128i) {
    // SAFETY: as in `put`.
    unsafe { if STREAM { _mm_stream_si128(pointer.cast(), value) } else { _mm_storeu_si128(pointer.cast(), value) } }
}

/// Each lane's bfloat16 in its upper half, with anything below.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn round_bf16(value: __m256) -> __m256i {
    // SAFETY: the caller vouches for the CPU.
    unsafe {
        let bits = _mm256_castps_si256(value);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
        _mm256_blendv_epi8(rounded, quiet, nan)
    }
}

/// Lane l plus lane l + 2, then l + 1.
///
/// # Safety
/// The CPU has AVX.
#[inline(always)]
pub(super) unsafe fn sum(value: __m256d) -> f64 {
    // SAFETY: the caller vouches for the CPU.
    unsafe {
        let half = _mm_add_pd(_mm256_castpd256_pd128(value), _mm256_extractf128_pd::<1>(value));
        _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)))
    }
}

impl Wide for Avx2 {
    type Wide = [__m256d; 2];

    #[inline(always)]
    unsafe fn wide_zero() -> [__m256d; 2] {
        // SAFETY: the caller vouches for the CPU.
        unsafe { [_mm256_setzero_pd(); 2] }
    }

    #[inline(always)]
    unsafe fn widen(value: __m256) -> [__m256d; 2] {
        // SAFETY: the caller vouches for the CPU.
        unsafe { [_mm256_cvtps_pd(_mm256_castps256_ps128(value)), _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(value))] }
    }

    #[inline(always)]
    unsafe fn wide_multiply_add(a: [__m256d; 2], b: [__m256d; 2], c: [__m256d; 2]) -> [__m256d; 2] {
        // SAFETY: the caller vouches for the CPU.
        unsafe { [_mm256_fmadd_pd(a[0], b[0], c[0]), _mm256_fmadd_pd(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    unsafe fn wide_add(a: [__m256d; 2], b: [__m256d; 2]) -> [__m256d; 2] {
        // SAFETY: the caller vouches for the CPU.
        unsafe { [_mm256_add_pd(a[0], b[0]), _mm256_add_pd(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn wide_sum([low, high]: [__m256d; 2]) -> f64 {
        // SAFETY: the caller vouches for the CPU.
        unsafe { sum(_mm256_add_pd(low, high)) }
    }

    #[inline(always)]
    unsafe fn multiply(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the caller vouches for the CPU.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn load_f32(group: *const u8, part: usize) -> [__m256; 2] {
        // SAFETY: the caller vouches for the CPU and for 32 values at the pointer.
        unsafe { [_mm256_loadu_ps(group.add(part * 32).cast()), _mm256_loadu_ps(group.add(64 + part * 32).cast())] }
    }

    #[inline(always)]
    unsafe fn load_f16(group: *const u8, part: usize) -> [__m256; 2] {
        // SAFETY: the caller vouches for the CPU and for 32 values at the pointer.
        unsafe {
            let low = _mm256_cvtph_ps(_mm_loadu_si128(group.add(part * 16).cast()));
            [low, _mm256_cvtph_ps(_mm_loadu_si128(group.add(32 + part * 16).cast()))]
        }
    }

    #[inline(always)]
    unsafe fn store_f32<const STREAM: bool>(group: *mut u8, part: usize, [low, high]: [__m256; 2]) {
        // SAFETY: the caller vouches for the CPU and the pointer.
        unsafe {
            put::<STREAM>(group.add(part * 32), _mm256_castps_si256(low));
            put::<STREAM>(group.add(64 + part * 32), _mm256_castps_si256(high));
        }
    }

    #[inline(always)]
    unsafe fn store_f16<const STREAM: bool>(group: *mut u8, part: usize, [low, high]: [__m256; 2]) {
        // SAFETY: the caller vouches for the CPU and the pointer.
        unsafe {
            put_half::<STREAM>(group.add(part * 16), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(low));
            put_half::<STREAM>(group.add(32 + part * 16), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(high));
        }
    }

    #[inline(always)]
    unsafe fn store_bf16<const STREAM: bool>(group: *mut u8, part: usize, [even, odd]: [__m256; 2]) {
        // SAFETY: the caller vouches for the CPU and the pointer.
        unsafe {
            let even = _mm256_srli_epi32::<16>(round_bf16(even));
            put::<STREAM>(group.add(part * 32), _mm256_blend_epi16::<0b1010_1010>(even, round_bf16(odd)));
        }
    }

    #[inline(always)]
    unsafe fn fence() {
        // SAFETY: SSE is part of x86-64.
        unsafe { _mm_sfence() }
    }
}
