//! Rounding of results to the dtype of the adapter.

use half::{bf16, f16};

use crate::kernels::Dtype;

/// Rows that are written together.
const BLOCK: usize = 64;

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
pub(super) fn round_row(values: &[f32], dtype: Dtype, output: &mut [u8]) -> Option<usize> {
    fn write<const SIZE: usize>(values: &[f32], output: &mut [u8], bytes: impl Fn(f32) -> [u8; SIZE]) {
        let (slots, _) = output.as_chunks_mut::<SIZE>();
        for (slot, value) in slots.iter_mut().zip(values) {
            *slot = bytes(*value);
        }
    }
    let is_finite: fn(f32) -> bool = match dtype {
        Dtype::F32 => f32::is_finite,
        Dtype::Bf16 => |value| bf16::from_f32(value).is_finite(),
        Dtype::F16 => |value| f16::from_f32(value).is_finite(),
    };
    match dtype {
        Dtype::F32 => write(values, output, f32::to_le_bytes),
        Dtype::Bf16 => write(values, output, |value| bf16::from_f32(value).to_le_bytes()),
        Dtype::F16 => write(values, output, |value| f16::from_f32(value).to_le_bytes()),
    }
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
