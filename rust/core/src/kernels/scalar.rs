//! The products in plain Rust: what every SIMD level is compared with.

use super::{Difference, Dtype, Matrix};

fn element(matrix: &Matrix<'_>, row: usize, col: usize) -> f32 {
    let bytes = matrix.row(row);
    match matrix.dtype() {
        Dtype::F32 => {
            let b = &bytes[col * 4..col * 4 + 4];
            f32::from_le_bytes([b[0], b[1], b[2], b[3]])
        }
        Dtype::Bf16 => half::bf16::from_le_bytes([bytes[col * 2], bytes[col * 2 + 1]]).to_f32(),
        Dtype::F16 => half::f16::from_le_bytes([bytes[col * 2], bytes[col * 2 + 1]]).to_f32(),
    }
}

fn difference(v: &Difference<'_>, row: usize, col: usize) -> f32 {
    element(&v.aligned(), row, col) - element(&v.base(), row, col)
}

pub(super) fn transposed_product(v: &Difference<'_>, x: &[f32], rank: usize, y: &mut [f32]) -> f64 {
    let mut norm = 0.0;
    for row in 0..v.rows() {
        for col in 0..v.cols() {
            let value = difference(v, row, col);
            norm += f64::from(value) * f64::from(value);
            for k in 0..rank {
                let y = &mut y[k * v.cols() + col];
                *y = value.mul_add(x[k * v.rows() + row], *y);
            }
        }
    }
    norm
}

pub(super) fn product(v: &Difference<'_>, x: &[f32], rank: usize, y: &mut [f32]) {
    y.fill(0.0);
    for row in 0..v.rows() {
        for col in 0..v.cols() {
            let value = difference(v, row, col);
            for k in 0..rank {
                let y = &mut y[k * v.rows() + row];
                *y = value.mul_add(x[k * v.cols() + col], *y);
            }
        }
    }
}
