//! AVX-512: one register is a logical vector.

use std::arch::x86_64::*;

use super::simd::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Avx512;

/// Lane indices for `_mm512_permutex2var_ps`; 16 and above select from the second operand.
const EVEN: [i32; 16] = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30];
const ODD: [i32; 16] = [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31];
const LOW: [i32; 16] = [0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23];
const HIGH: [i32; 16] = [8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31];

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
fn permute(a: __m512, b: __m512, lanes: &[i32; 16]) -> __m512 {
    // SAFETY: `lanes` holds one register.
    let lanes = unsafe { _mm512_loadu_epi32(lanes.as_ptr()) };
    _mm512_permutex2var_ps(a, lanes, b)
}

/// # Safety
/// The CPU has AVX-512 F, and 64 bytes at `pointer` may be written; with `STREAM`, `pointer` is aligned to 64 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
unsafe fn put<const STREAM: bool>(pointer: *mut u8, value: __m512i) {
    // SAFETY: see above; trait functions that stream require a later `fence`.
    unsafe {
        if STREAM { _mm512_stream_si512(pointer.cast(), value) } else { _mm512_storeu_si512(pointer.cast(), value) }
    }
}

/// Rounds each lane to bfloat16 in its upper half; the lower half is arbitrary.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
fn round_bf16(value: __m512) -> __m512i {
    let bits = _mm512_castps_si512(value);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
    _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000))
}

impl Simd for Avx512 {
    type Register = __m512;
    type Wide = [__m512d; 2];
    const WIDTH: usize = 16;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn zero() -> __m512 {
        _mm512_setzero_ps()
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn load(pointer: *const f32) -> __m512 {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe { _mm512_load_ps(pointer) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn store(pointer: *mut f32, value: __m512) {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe { _mm512_store_ps(pointer, value) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn splat(pointer: *const f32) -> __m512 {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe { _mm512_set1_ps(*pointer) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn subtract(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn multiply_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn split_f32(pointer: *const u8) -> [__m512; 2] {
        // SAFETY: 32 values are readable at the pointer by the contract of `Simd`.
        unsafe {
            let low = _mm512_loadu_ps(pointer.cast());
            let high = _mm512_loadu_ps(pointer.add(64).cast());
            [permute(low, high, &EVEN), permute(low, high, &ODD)]
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn split_bf16(pointer: *const u8) -> [__m512; 2] {
        // SAFETY: 32 values are readable at the pointer by the contract of `Simd`.
        unsafe {
            let pairs = _mm512_loadu_si512(pointer.cast());
            let even = _mm512_slli_epi32::<16>(pairs);
            let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
            [_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)]
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn split_f16(pointer: *const u8) -> [__m512; 2] {
        // SAFETY: 32 values are readable at the pointer by the contract of `Simd`.
        unsafe {
            let low = _mm512_cvtph_ps(_mm256_loadu_si256(pointer.cast()));
            let high = _mm512_cvtph_ps(_mm256_loadu_si256(pointer.add(32).cast()));
            [permute(low, high, &EVEN), permute(low, high, &ODD)]
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn join([even, odd]: [__m512; 2]) -> [__m512; 2] {
        [permute(even, odd, &LOW), permute(even, odd, &HIGH)]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn sums([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        // Each step adds halves of two registers, so that one register holds the sums of both. A blend and a shuffle
        // bring the halves together; the order of the two terms does not change a sum.
        let halves =
            |a, b| _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4::<0b01_00_11_10>(a, b));
        let (ab, cd) = (halves(a, b), halves(c, d));
        let swapped = _mm512_shuffle_f32x4::<0b10_11_00_01>;
        let quarters = _mm512_mask_blend_ps(0xf0f0, swapped(ab, ab), swapped(cd, cd));
        let sums = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, ab, cd), quarters);
        let sums = _mm512_add_ps(sums, _mm512_permute_ps::<0b01_00_11_10>(sums));
        let sums = _mm512_add_ps(sums, _mm512_permute_ps::<0b10_11_00_01>(sums));
        // The quarters hold the sums of a, c, b, and d.
        let order = _mm512_setr_epi32(0, 8, 4, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        let mut result = [0.0; 4];
        // SAFETY: `result` holds four values.
        unsafe { _mm_storeu_ps(result.as_mut_ptr(), _mm512_castps512_ps128(_mm512_permutexvar_ps(order, sums))) };
        result
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn wide_zero() -> [__m512d; 2] {
        [_mm512_setzero_pd(); 2]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn widen(value: __m512) -> [__m512d; 2] {
        [_mm512_cvtps_pd(_mm512_castps512_ps256(value)), _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(value))]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn wide_multiply_add(a: [__m512d; 2], b: [__m512d; 2], c: [__m512d; 2]) -> [__m512d; 2] {
        [_mm512_fmadd_pd(a[0], b[0], c[0]), _mm512_fmadd_pd(a[1], b[1], c[1])]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn wide_add(a: [__m512d; 2], b: [__m512d; 2]) -> [__m512d; 2] {
        [_mm512_add_pd(a[0], b[0]), _mm512_add_pd(a[1], b[1])]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn wide_sum([low, high]: [__m512d; 2]) -> f64 {
        let value = _mm512_add_pd(low, high);
        super::avx2::sum(_mm256_add_pd(_mm512_castpd512_pd256(value), _mm512_extractf64x4_pd::<1>(value)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn multiply(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn load_f32(pointer: *const u8, _: usize) -> [__m512; 2] {
        // SAFETY: 32 values are readable at the pointer by the contract of `Simd`.
        unsafe { [_mm512_loadu_ps(pointer.cast()), _mm512_loadu_ps(pointer.add(64).cast())] }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn load_f16(pointer: *const u8, _: usize) -> [__m512; 2] {
        // SAFETY: 32 values are readable at the pointer by the contract of `Simd`.
        unsafe {
            let low = _mm512_cvtph_ps(_mm256_loadu_si256(pointer.cast()));
            [low, _mm512_cvtph_ps(_mm256_loadu_si256(pointer.add(32).cast()))]
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn store_f32<const STREAM: bool>(pointer: *mut u8, _: usize, [low, high]: [__m512; 2]) {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe {
            put::<STREAM>(pointer, _mm512_castps_si512(low));
            put::<STREAM>(pointer.add(64), _mm512_castps_si512(high));
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn store_f16<const STREAM: bool>(pointer: *mut u8, _: usize, [low, high]: [__m512; 2]) {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe {
            let low = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(low);
            let high = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(high);
            put::<STREAM>(pointer, _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high));
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn store_bf16<const STREAM: bool>(pointer: *mut u8, _: usize, [even, odd]: [__m512; 2]) {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe {
            let even = _mm512_srli_epi32::<16>(round_bf16(even));
            put::<STREAM>(pointer, _mm512_mask_blend_epi16(0xaaaa_aaaa, even, round_bf16(odd)));
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    unsafe fn fence() {
        _mm_sfence();
    }
}
