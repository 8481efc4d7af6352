//! AVX-512: two registers of f64 make a logical vector.

use std::arch::x86_64::*;

use super::wide::Wide;
use crate::kernels::Avx512;

/// # Safety
/// The CPU has AVX-512 F, and 64 bytes at `pointer` may be written; with `STREAM` it is aligned to them.
#[inline(always)]
unsafe fn put<const STREAM: bool>(pointer: *mut u8, value: __m512i) {
    // SAFETY: the caller vouches for the CPU and the pointer; every trait function that streams leaves the fence to the caller.
    unsafe {
        if STREAM { _mm512_stream_si512(pointer.cast(), value) } else { _mm512_storeu_si512(pointer.cast(), value) }
    }
}

/// Each lane's bfloat16 in its upper half, with anything below.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn round_bf16(value: __m512) -> __m512i {
    // SAFETY: the caller vouches for the CPU.
    unsafe {
        let bits = _mm512_castps_si512(value);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
        _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000))
    }
}

impl Wide for Avx512 {
    type Wide = [__m512d; 2];

    #[inline(always)]
    unsafe fn wide_zero() -> [__m512d; 2] {
        // SAFETY: the caller vouches for the CPU.
        unsafe { [_mm512_setzero_pd(); 2] }
    }

    #[inline(always)]
    unsafe fn widen(value: __m512) -> [__m512d; 2] {
        // SAFETY: the caller vouches for the CPU.
        unsafe { [_mm512_cvtps_pd(_mm512_castps512_ps256(value)), _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(value))] }
    }

    #[inline(always)]
    unsafe fn wide_multiply_add(a: [__m512d; 2], b: [__m512d; 2], c: [__m512d; 2]) -> [__m512d; 2] {
        // SAFETY: the caller vouches for the CPU.
        unsafe { [_mm512_fmadd_pd(a[0], b[0], c[0]), _mm512_fmadd_pd(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    unsafe fn wide_add(a: [__m512d; 2], b: [__m512d; 2]) -> [__m512d; 2] {
        // SAFETY: the caller vouches for the CPU.
        unsafe { [_mm512_add_pd(a[0], b[0]), _mm512_add_pd(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn wide_sum([low, high]: [__m512d; 2]) -> f64 {
        // SAFETY: the caller vouches for the CPU, and AVX-512 implies AVX.
        unsafe {
            let value = _mm512_add_pd(low, high);
            super::avx2::sum(_mm256_add_pd(_mm512_castpd512_pd256(value), _mm512_extractf64x4_pd::<1>(value)))
        }
    }

    #[inline(always)]
    unsafe fn multiply(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller vouches for the CPU.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn load_f32(pointer: *const u8, _: usize) -> [__m512; 2] {
        // SAFETY: the caller vouches for the CPU and for 32 values at the pointer.
        unsafe { [_mm512_loadu_ps(pointer.cast()), _mm512_loadu_ps(pointer.add(64).cast())] }
    }

    #[inline(always)]
    unsafe fn load_f16(pointer: *const u8, _: usize) -> [__m512; 2] {
        // SAFETY: the caller vouches for the CPU and for 32 values at the pointer.
        unsafe {
            let low = _mm512_cvtph_ps(_mm256_loadu_si256(pointer.cast()));
            [low, _mm512_cvtph_ps(_mm256_loadu_si256(pointer.add(32).cast()))]
        }
    }

    #[inline(always)]
    unsafe fn store_f32<const STREAM: bool>(pointer: *mut u8, _: usize, [low, high]: [__m512; 2]) {
        // SAFETY: the caller vouches for the CPU and the pointer.
        unsafe {
            put::<STREAM>(pointer, _mm512_castps_si512(low));
            put::<STREAM>(pointer.add(64), _mm512_castps_si512(high));
        }
    }

    #[inline(always)]
    unsafe fn store_f16<const STREAM: bool>(pointer: *mut u8, _: usize, [low, high]: [__m512; 2]) {
        // SAFETY: the caller vouches for the CPU and the pointer.
        unsafe {
            let low = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(low);
            let high = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(high);
            put::<STREAM>(pointer, _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high));
        }
    }

    #[inline(always)]
    unsafe fn store_bf16<const STREAM: bool>(pointer: *mut u8, _: usize, [even, odd]: [__m512; 2]) {
        // SAFETY: the caller vouches for the CPU and the pointer.
        unsafe {
            let even = _mm512_srli_epi32::<16>(round_bf16(even));
            put::<STREAM>(pointer, _mm512_mask_blend_epi16(0xaaaa_aaaa, even, round_bf16(odd)));
        }
    }

    #[inline(always)]
    unsafe fn fence() {
        // SAFETY: SSE is part of x86-64.
        unsafe { _mm_sfence() }
    }
}
