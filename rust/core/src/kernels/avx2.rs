//! AVX2 with FMA and F16C: two registers form a logical vector.

use std::arch::x86_64::*;

use super::simd::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn split(low: __m256, high: __m256) -> [__m256; 2] {
    let even = _mm256_castps_pd(_mm256_shuffle_ps::<0b10_00_10_00>(low, high));
    let odd = _mm256_castps_pd(_mm256_shuffle_ps::<0b11_01_11_01>(low, high));
    let even = _mm256_permute4x64_pd::<0b11_01_10_00>(even);
    let odd = _mm256_permute4x64_pd::<0b11_01_10_00>(odd);
    [_mm256_castpd_ps(even), _mm256_castpd_ps(odd)]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sums(values: [__m256; 4]) -> [f32; 4] {
    let mut quarters = [_mm_setzero_ps(); 4];
    for (quarter, value) in quarters.iter_mut().zip(values) {
        *quarter = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps::<1>(value));
    }
    let [a, b, c, d] = quarters;
    let ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
    let cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
    let sum = _mm_add_ps(_mm_shuffle_ps::<0b10_00_10_00>(ab, cd), _mm_shuffle_ps::<0b11_01_11_01>(ab, cd));
    let mut result = [0.0; 4];
    // SAFETY: `result` holds four values.
    unsafe { _mm_storeu_ps(result.as_mut_ptr(), sum) };
    result
}

/// # Safety
/// The CPU has AVX, and 32 bytes at `pointer` may be written; with `STREAM`, `pointer` is aligned to 32 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn put<const STREAM: bool>(pointer: *mut u8, value: __m256i) {
    // SAFETY: see above; trait functions that stream require a later `fence`.
    unsafe {
        if STREAM { _mm256_stream_si256(pointer.cast(), value) } else { _mm256_storeu_si256(pointer.cast(), value) }
    }
}

/// # Safety
/// The CPU has SSE2, and 16 bytes at `pointer` may be written; with `STREAM`, `pointer` is aligned to 16 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn put_half<const STREAM: bool>(pointer: *mut u8, value: __m128i) {
    // SAFETY: as in `put`.
    unsafe { if STREAM { _mm_stream_si128(pointer.cast(), value) } else { _mm_storeu_si128(pointer.cast(), value) } }
}

/// Rounds each lane to bfloat16 in its upper half; the lower half is arbitrary.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn round_bf16(value: __m256) -> __m256i {
    let bits = _mm256_castps_si256(value);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
    _mm256_blendv_epi8(rounded, quiet, nan)
}

/// Lane l plus lane l + 2, then l + 1.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sum(value: __m256d) -> f64 {
    let half = _mm_add_pd(_mm256_castpd256_pd128(value), _mm256_extractf128_pd::<1>(value));
    _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)))
}

impl Simd for Avx2 {
    type Register = __m256;
    type Wide = [__m256d; 2];
    const WIDTH: usize = 8;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn zero() -> __m256 {
        _mm256_setzero_ps()
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(pointer: *const f32) -> __m256 {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe { _mm256_load_ps(pointer) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store(pointer: *mut f32, value: __m256) {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe { _mm256_store_ps(pointer, value) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn splat(pointer: *const f32) -> __m256 {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe { _mm256_set1_ps(*pointer) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        _mm256_add_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn subtract(a: __m256, b: __m256) -> __m256 {
        _mm256_sub_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn multiply_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fmadd_ps(a, b, c)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn split_f32(pointer: *const u8) -> [__m256; 2] {
        // SAFETY: 16 values are readable at the pointer by the contract of `Simd`.
        unsafe { split(_mm256_loadu_ps(pointer.cast()), _mm256_loadu_ps(pointer.add(32).cast())) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn split_bf16(pointer: *const u8) -> [__m256; 2] {
        // SAFETY: 16 values are readable at the pointer by the contract of `Simd`.
        unsafe {
            let pairs = _mm256_loadu_si256(pointer.cast());
            let even = _mm256_slli_epi32::<16>(pairs);
            let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
            [_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd)]
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn split_f16(pointer: *const u8) -> [__m256; 2] {
        // SAFETY: 16 values are readable at the pointer by the contract of `Simd`.
        unsafe {
            let low = _mm256_cvtph_ps(_mm_loadu_si128(pointer.cast()));
            let high = _mm256_cvtph_ps(_mm_loadu_si128(pointer.add(16).cast()));
            split(low, high)
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn join([even, odd]: [__m256; 2]) -> [__m256; 2] {
        let low = _mm256_unpacklo_ps(even, odd);
        let high = _mm256_unpackhi_ps(even, odd);
        [_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high)]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn sums(values: [__m256; 4]) -> [f32; 4] {
        sums(values)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn wide_zero() -> [__m256d; 2] {
        [_mm256_setzero_pd(); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn widen(value: __m256) -> [__m256d; 2] {
        [_mm256_cvtps_pd(_mm256_castps256_ps128(value)), _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(value))]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn wide_multiply_add(a: [__m256d; 2], b: [__m256d; 2], c: [__m256d; 2]) -> [__m256d; 2] {
        [_mm256_fmadd_pd(a[0], b[0], c[0]), _mm256_fmadd_pd(a[1], b[1], c[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn wide_add(a: [__m256d; 2], b: [__m256d; 2]) -> [__m256d; 2] {
        [_mm256_add_pd(a[0], b[0]), _mm256_add_pd(a[1], b[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn wide_sum([low, high]: [__m256d; 2]) -> f64 {
        sum(_mm256_add_pd(low, high))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn multiply(a: __m256, b: __m256) -> __m256 {
        _mm256_mul_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_f32(group: *const u8, part: usize) -> [__m256; 2] {
        // SAFETY: 32 values are readable at the pointer by the contract of `Simd`.
        unsafe { [_mm256_loadu_ps(group.add(part * 32).cast()), _mm256_loadu_ps(group.add(64 + part * 32).cast())] }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_f16(group: *const u8, part: usize) -> [__m256; 2] {
        // SAFETY: 32 values are readable at the pointer by the contract of `Simd`.
        unsafe {
            let low = _mm256_cvtph_ps(_mm_loadu_si128(group.add(part * 16).cast()));
            [low, _mm256_cvtph_ps(_mm_loadu_si128(group.add(32 + part * 16).cast()))]
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_f32<const STREAM: bool>(group: *mut u8, part: usize, [low, high]: [__m256; 2]) {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe {
            put::<STREAM>(group.add(part * 32), _mm256_castps_si256(low));
            put::<STREAM>(group.add(64 + part * 32), _mm256_castps_si256(high));
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_f16<const STREAM: bool>(group: *mut u8, part: usize, [low, high]: [__m256; 2]) {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe {
            put_half::<STREAM>(group.add(part * 16), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(low));
            put_half::<STREAM>(group.add(32 + part * 16), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(high));
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_bf16<const STREAM: bool>(group: *mut u8, part: usize, [even, odd]: [__m256; 2]) {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe {
            let even = _mm256_srli_epi32::<16>(round_bf16(even));
            put::<STREAM>(group.add(part * 32), _mm256_blend_epi16::<0b1010_1010>(even, round_bf16(odd)));
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn fence() {
        _mm_sfence();
    }
}
