//! ‖V‖² (Frobenius) where squares leave the range of f32.

use rayon::prelude::*;

use super::Difference;
use super::micro::{Kernels, Staged};
use super::simd::{GROUP, LANES, Line};

/// Whether squares in f32 may have lost something that matters: overflowed, or fallen below the smallest normal number.
pub(super) fn is_doubtful(squares: f64, v: &Difference<'_>) -> bool {
    let elements = v.rows() as f64 * v.cols() as f64;
    // A square that underflows is off by 2⁻¹⁵⁰ at most: here all of them together stay below 2⁻³⁰ of the sum.
    !squares.is_finite() || squares < elements * 2.0_f64.powi(-120)
}

/// ‖V‖² with squares in f64, row by row.
pub(super) fn run<L: Kernels>(v: &Difference<'_>) -> f64 {
    let rows: Vec<f64> = (0..v.rows()).into_par_iter().map(|row| squares::<L>(v, row)).collect();
    rows.iter().sum()
}

fn squares<L: Kernels>(v: &Difference<'_>, row: usize) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    for start in (0..v.cols()).step_by(GROUP) {
        let mut staged = [Line::ZERO; 2];
        let width = GROUP.min(v.cols() - start);
        let target = Staged { pointer: staged.as_mut_ptr().cast(), row_step: 0, odd_step: LANES, group_step: 0 };
        let mut copies = [[0_u8; 4 * GROUP]; 2];
        let corners = [v.aligned(), v.base()].map(|matrix| matrix.corner(row, start));
        let mut corners = corners;
        if width < GROUP {
            for ((matrix, copy), corner) in [v.aligned(), v.base()].iter().zip(&mut copies).zip(&mut corners) {
                let rest = &matrix.row(row)[start * matrix.dtype().size()..];
                copy[..rest.len()].copy_from_slice(rest);
                corner.pointer = copy.as_ptr();
            }
        }
        // SAFETY: both corners hold a group of 32 elements, and so does `staged`; the engine has checked the CPU.
        unsafe { L::stage(corners[0], corners[1], corners[0].pointer, 1, 1, target) };
        for line in staged {
            for (lane, value) in lanes.iter_mut().zip(line.0) {
                *lane += f64::from(value) * f64::from(value);
            }
        }
    }
    lanes.iter().sum()
}
