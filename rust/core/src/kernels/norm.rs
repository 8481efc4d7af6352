//! ‖V‖² (Frobenius) when squares leave the range of f32.

use rayon::prelude::*;

use super::Difference;
use super::micro::Kernels;
use super::simd::{GROUP, LANES, Line};

/// Whether squares in f32 may be inaccurate: some overflowed, or fell below the smallest normal number.
pub(super) fn is_doubtful(squares: f64, v: &Difference<'_>) -> bool {
    let elements = v.rows() as f64 * v.cols() as f64;
    // A square that underflows is off by at most 2⁻¹⁵⁰. Above this bound, all such errors together are below 2⁻³⁰ of
    // the sum.
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
        let mut copies = [[0_u8; 4 * GROUP]; 2];
        let mut pointers = [v.aligned(), v.base()].map(|matrix| matrix.corner(row, start).pointer);
        if width < GROUP {
            for ((matrix, copy), pointer) in [v.aligned(), v.base()].iter().zip(&mut copies).zip(&mut pointers) {
                let rest = &matrix.row(row)[start * matrix.dtype().size()..];
                copy[..rest.len()].copy_from_slice(rest);
                *pointer = copy.as_ptr();
            }
        }
        let dtypes = [v.aligned().dtype(), v.base().dtype()];
        // SAFETY: both pointers lead to a group of 32 elements, and `staged` has room for it; the engine has checked
        // the CPU.
        unsafe { L::stage(pointers, dtypes, 1, staged.as_mut_ptr()) };
        for line in staged {
            for (lane, value) in lanes.iter_mut().zip(line.0) {
                *lane += f64::from(value) * f64::from(value);
            }
        }
    }
    lanes.iter().sum()
}
