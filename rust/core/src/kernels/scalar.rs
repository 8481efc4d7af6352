//! Plain Rust, for CPUs without the wider levels, and as the baseline that they are compared with.

use super::simd::{LANES, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Scalar;

/// `a·b + c` rounded once, like the hardware's fused multiply-add.
///
/// The product of two f32 is exact in f64. Its sum with `c` is rounded to odd (the last bit records whether anything
/// was lost), so rounding it again to f32 gives the correctly rounded result (Boldo and Melquiond 2008). Unlike libm's
/// `fmaf`, this is fast without an FMA instruction, and vectorizes.
#[inline(always)]
fn fused(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
        return a.mul_add(b, c);
    }
    let product = f64::from(a) * f64::from(b);
    let addend = f64::from(c);
    let sum = product + addend;
    let rest = sum - product;
    let lost = (product - (sum - rest)) + (addend - rest);
    let bits = sum.to_bits();
    let inexact = lost.abs() > 0.0 && bits & 1 == 0;
    let away_from_zero = (lost > 0.0) == (sum > 0.0);
    let odd = bits.wrapping_add(if away_from_zero { 1 } else { u64::MAX });
    f64::from_bits(if inexact { odd } else { bits }) as f32
}

#[inline(always)]
fn each(mut value: impl FnMut(usize) -> f32) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    for (index, lane) in lanes.iter_mut().enumerate() {
        *lane = value(index);
    }
    lanes
}

/// # Safety
/// `2·LANES` values of `SIZE` bytes are readable at `pointer`.
#[inline(always)]
unsafe fn split<const SIZE: usize>(pointer: *const u8, decode: impl Fn([u8; SIZE]) -> f32) -> [[f32; LANES]; 2] {
    // SAFETY: see above; byte arrays have no alignment.
    let values = unsafe { &*pointer.cast::<[[u8; SIZE]; 2 * LANES]>() };
    [each(|lane| decode(values[2 * lane])), each(|lane| decode(values[2 * lane + 1]))]
}

impl Simd for Scalar {
    type Register = [f32; LANES];
    type Wide = [f64; LANES];
    const WIDTH: usize = LANES;

    #[inline(always)]
    unsafe fn zero() -> [f32; LANES] {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn load(pointer: *const f32) -> [f32; LANES] {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe { *pointer.cast() }
    }

    #[inline(always)]
    unsafe fn store(pointer: *mut f32, value: [f32; LANES]) {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe { *pointer.cast() = value }
    }

    #[inline(always)]
    unsafe fn splat(pointer: *const f32) -> [f32; LANES] {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        [unsafe { *pointer }; LANES]
    }

    #[inline(always)]
    unsafe fn add(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        each(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    unsafe fn subtract(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        each(|lane| a[lane] - b[lane])
    }

    #[inline(always)]
    unsafe fn multiply_add(a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        each(|lane| fused(a[lane], b[lane], c[lane]))
    }

    #[inline(always)]
    unsafe fn split_f32(pointer: *const u8) -> [[f32; LANES]; 2] {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe { split(pointer, f32::from_le_bytes) }
    }

    #[inline(always)]
    unsafe fn split_bf16(pointer: *const u8) -> [[f32; LANES]; 2] {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe { split(pointer, |bytes| half::bf16::from_le_bytes(bytes).to_f32()) }
    }

    #[inline(always)]
    unsafe fn split_f16(pointer: *const u8) -> [[f32; LANES]; 2] {
        // SAFETY: the pointer is valid by the contract of `Simd`.
        unsafe { split(pointer, |bytes| half::f16::from_le_bytes(bytes).to_f32()) }
    }

    #[inline(always)]
    unsafe fn join([even, odd]: [[f32; LANES]; 2]) -> [[f32; LANES]; 2] {
        let pick = |index: usize| if index.is_multiple_of(2) { even[index / 2] } else { odd[index / 2] };
        [each(pick), each(|lane| pick(LANES + lane))]
    }

    #[inline(always)]
    unsafe fn sums(values: [[f32; LANES]; 4]) -> [f32; 4] {
        values.map(|mut lanes| {
            for width in [8, 4, 2, 1] {
                for lane in 0..width {
                    lanes[lane] += lanes[lane + width];
                }
            }
            lanes[0]
        })
    }

    #[inline(always)]
    unsafe fn wide_zero() -> [f64; LANES] {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn widen(value: [f32; LANES]) -> [f64; LANES] {
        value.map(f64::from)
    }

    #[inline(always)]
    unsafe fn wide_multiply_add(a: [f64; LANES], b: [f64; LANES], c: [f64; LANES]) -> [f64; LANES] {
        std::array::from_fn(|lane| a[lane] * b[lane] + c[lane])
    }

    #[inline(always)]
    unsafe fn wide_add(a: [f64; LANES], b: [f64; LANES]) -> [f64; LANES] {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    unsafe fn wide_sum(mut lanes: [f64; LANES]) -> f64 {
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    }

    #[inline(always)]
    unsafe fn multiply(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    unsafe fn load_f32(pointer: *const u8, _: usize) -> [[f32; LANES]; 2] {
        // SAFETY: the pointer is valid by the contract of `Simd`; byte arrays have no alignment.
        let halves = unsafe { &*pointer.cast::<[[[u8; 4]; LANES]; 2]>() };
        halves.map(|half| half.map(f32::from_le_bytes))
    }

    #[inline(always)]
    unsafe fn load_f16(pointer: *const u8, _: usize) -> [[f32; LANES]; 2] {
        // SAFETY: the pointer is valid by the contract of `Simd`; byte arrays have no alignment.
        let halves = unsafe { &*pointer.cast::<[[[u8; 2]; LANES]; 2]>() };
        halves.map(|half| half.map(|bytes| half::f16::from_le_bytes(bytes).to_f32()))
    }

    #[inline(always)]
    unsafe fn store_f32<const STREAM: bool>(pointer: *mut u8, _: usize, halves: [[f32; LANES]; 2]) {
        // SAFETY: the pointer is valid by the contract of `Simd`; byte arrays have no alignment.
        unsafe { *pointer.cast() = halves.map(|half| half.map(f32::to_le_bytes)) }
    }

    #[inline(always)]
    unsafe fn store_f16<const STREAM: bool>(pointer: *mut u8, _: usize, halves: [[f32; LANES]; 2]) {
        let rounded = halves.map(|half| half.map(|value| half::f16::from_f32(value).to_le_bytes()));
        // SAFETY: the pointer is valid by the contract of `Simd`; byte arrays have no alignment.
        unsafe { *pointer.cast() = rounded }
    }

    #[inline(always)]
    unsafe fn store_bf16<const STREAM: bool>(pointer: *mut u8, _: usize, [even, odd]: [[f32; LANES]; 2]) {
        let pairs: [[[u8; 2]; 2]; LANES] =
            std::array::from_fn(|lane| [even[lane], odd[lane]].map(|value| half::bf16::from_f32(value).to_le_bytes()));
        // SAFETY: the pointer is valid by the contract of `Simd`; byte arrays have no alignment.
        unsafe { *pointer.cast() = pairs }
    }

    #[inline(always)]
    unsafe fn fence() {}
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn fused_rounds_once(a in any::<u32>(), b in any::<u32>(), c in any::<u32>(), near in 0_u32..64) {
            let (a, b) = (f32::from_bits(a), f32::from_bits(b));
            // Every other addend is near the product, where cancellation and double rounding happen.
            let c = if near.is_multiple_of(2) { f32::from_bits(c) } else { f32::from_bits((-(a * b)).to_bits().wrapping_add(near)) };
            let (ours, theirs) = (fused(a, b, c), a.mul_add(b, c));
            prop_assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{a:e} {b:e} {c:e}");
        }
    }

    #[test]
    fn fused_survives_double_rounding() {
        // 1 + 2^-24 + 2^-60: rounding through f64 alone gives the tie 1 + 2^-24, hence 1.
        let (a, b, c) = (2.0_f32.powi(-30), 2.0_f32.powi(-30), 1.0 + f32::EPSILON);
        assert_eq!(fused(a, b, c).to_bits(), a.mul_add(b, c).to_bits());
        let half_ulp = 2.0_f32.powi(-12) + 2.0_f32.powi(-35);
        assert_eq!(
            fused(half_ulp, 2.0_f32.powi(-12), 1.0).to_bits(),
            half_ulp.mul_add(2.0_f32.powi(-12), 1.0).to_bits()
        );
    }
}
