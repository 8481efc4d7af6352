//! Plain Rust.

use super::wide::Wide;
use crate::kernels::{LANES, Scalar};

impl Wide for Scalar {
    type Wide = [f64; LANES];

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
        // SAFETY: the caller vouches for the pointer; byte arrays have no alignment.
        let halves = unsafe { &*pointer.cast::<[[[u8; 4]; LANES]; 2]>() };
        halves.map(|half| half.map(f32::from_le_bytes))
    }

    #[inline(always)]
    unsafe fn load_f16(pointer: *const u8, _: usize) -> [[f32; LANES]; 2] {
        // SAFETY: the caller vouches for the pointer; byte arrays have no alignment.
        let halves = unsafe { &*pointer.cast::<[[[u8; 2]; LANES]; 2]>() };
        halves.map(|half| half.map(|bytes| half::f16::from_le_bytes(bytes).to_f32()))
    }

    #[inline(always)]
    unsafe fn store_f32<const STREAM: bool>(pointer: *mut u8, _: usize, halves: [[f32; LANES]; 2]) {
        // SAFETY: the caller vouches for the pointer; byte arrays have no alignment.
        unsafe { *pointer.cast() = halves.map(|half| half.map(f32::to_le_bytes)) }
    }

    #[inline(always)]
    unsafe fn store_f16<const STREAM: bool>(pointer: *mut u8, _: usize, halves: [[f32; LANES]; 2]) {
        let rounded = halves.map(|half| half.map(|value| half::f16::from_f32(value).to_le_bytes()));
        // SAFETY: the caller vouches for the pointer; byte arrays have no alignment.
        unsafe { *pointer.cast() = rounded }
    }

    #[inline(always)]
    unsafe fn store_bf16<const STREAM: bool>(pointer: *mut u8, _: usize, [even, odd]: [[f32; LANES]; 2]) {
        let pairs: [[[u8; 2]; 2]; LANES] =
            std::array::from_fn(|lane| [even[lane], odd[lane]].map(|value| half::bf16::from_f32(value).to_le_bytes()));
        // SAFETY: the caller vouches for the pointer; byte arrays have no alignment.
        unsafe { *pointer.cast() = pairs }
    }

    #[inline(always)]
    unsafe fn fence() {}
}
