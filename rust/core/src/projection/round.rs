//! Rounding of results to the dtype of the adapter.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::kernels::Dtype;

/// Rows that are written together.
const BLOCK: usize = 64;
/// The exponent of a binary32 that is NaN or infinite.
const INFINITE: u32 = 0x7f80_0000;

/// A result that is out of its dtype's range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overflow {
    /// Row of one such element.
    pub row: usize,
    /// Column of that element.
    pub col: usize,
    /// Its value.
    pub value: f64,
}

/// Writes `factor`·x in `dtype`, rounded to nearest even. x is stored as columns of `rows` values each.
///
/// `element(row, col)` is the offset in bytes of an element of the output. Returns an element that overflows, if any.
///
/// # Panics
/// If an offset is beyond the output.
pub fn write_rounded(
    columns: &[f32],
    rows: usize,
    factor: f64,
    dtype: Dtype,
    element: impl Fn(usize, usize) -> usize,
    output: &mut [u8],
) -> Option<Overflow> {
    match dtype {
        Dtype::F32 => write(columns, rows, factor, f32::is_finite, f32::to_le_bytes, element, output),
        Dtype::Bf16 => write(
            columns,
            rows,
            factor,
            |value| bf16::from_f32(value).is_finite(),
            |value| bf16::from_f32(value).to_le_bytes(),
            element,
            output,
        ),
        Dtype::F16 => write(
            columns,
            rows,
            factor,
            |value| f16::from_f32(value).is_finite(),
            |value| f16::from_f32(value).to_le_bytes(),
            element,
            output,
        ),
    }
}

/// Writes values in `dtype`, rounded to nearest even. Returns the position of the first that overflows, if any.
#[allow(clippy::inline_always, reason = "a function with CPU features inlines it to use them")]
#[inline(always)]
pub(super) fn round_row(values: &[f32], dtype: Dtype, output: &mut [u8]) -> Option<usize> {
    let mut overflows = 0;
    match dtype {
        Dtype::F32 => {
            for (slot, value) in output.as_chunks_mut().0.iter_mut().zip(values) {
                overflows |= u32::from(!value.is_finite());
                *slot = value.to_le_bytes();
            }
        }
        Dtype::Bf16 => {
            for (slot, value) in output.as_chunks_mut().0.iter_mut().zip(values) {
                let bits = value.to_bits();
                // Half of the last kept digit, minus one if the digit is even: ties go to even.
                let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
                overflows |= u32::from(bits & INFINITE == INFINITE) | u32::from(rounded & INFINITE == INFINITE);
                *slot = ((rounded >> 16) as u16).to_le_bytes();
            }
        }
        Dtype::F16 => {
            let mut halves = [f16::ZERO; BLOCK];
            for (slots, values) in output.chunks_mut(2 * BLOCK).zip(values.chunks(BLOCK)) {
                let halves = &mut halves[..values.len()];
                halves.convert_from_f32_slice(values);
                for (slot, half) in slots.as_chunks_mut().0.iter_mut().zip(&*halves) {
                    overflows |= u32::from(!half.is_finite());
                    *slot = half.to_le_bytes();
                }
            }
        }
    }
    if overflows == 0 {
        return None;
    }
    let is_finite: fn(f32) -> bool = match dtype {
        Dtype::F32 => f32::is_finite,
        Dtype::Bf16 => |value| bf16::from_f32(value).is_finite(),
        Dtype::F16 => |value| f16::from_f32(value).is_finite(),
    };
    values.iter().position(|value| !is_finite(*value))
}

fn write<const SIZE: usize>(
    columns: &[f32],
    rows: usize,
    factor: f64,
    is_finite: impl Fn(f32) -> bool,
    bytes: impl Fn(f32) -> [u8; SIZE],
    element: impl Fn(usize, usize) -> usize,
    output: &mut [u8],
) -> Option<Overflow> {
    let mut overflow = None;
    // Adjacent columns share cache lines of a row-major output: write a few rows of all columns before continuing.
    for block in (0..rows).step_by(BLOCK) {
        for (col, column) in columns.chunks_exact(rows).enumerate() {
            for (row, value) in column.iter().enumerate().skip(block).take(BLOCK) {
                let value = f64::from(*value) * factor;
                if !is_finite(value as f32) && overflow.is_none() {
                    overflow = Some(Overflow { row, col, value });
                }
                let start = element(row, col);
                output[start..start + SIZE].copy_from_slice(&bytes(value as f32));
            }
        }
    }
    overflow
}
