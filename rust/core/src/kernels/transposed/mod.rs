//! `y += Vᵀ·x`: V is read once; lanes are columns.
//!
//! Every column of every vector is summed with fused multiply-adds in the order of the rows, starting from zero in each
//! block of 1024 rows. The sums of the blocks are added to `y` in order. The squares of V are summed the same way in
//! each column of a block, and then in f64: over the columns of a group of 32, the blocks, the groups.
//!
//! Few vectors are limited by memory, so V is read in long rows (`streamed`). Many are limited by multiply-adds, so
//! their sums stay in registers (`tiled`). Both add in the same order and give the same bits.

mod streamed;
mod tiled;

use std::ops::Range;

use super::micro::{Corner, Kernels};
use super::simd::{GROUP, Line};
use super::workspace::Workspace;
use super::{Difference, Matrix};

/// Rows in a block, whose sums start from zero.
const BLOCK: usize = 1024;

pub(super) fn run<L: Kernels>(
    v: &Difference<'_>,
    x: &[f32],
    rank: usize,
    y: &mut [f32],
    threads: usize,
    workspace: &mut Workspace,
) -> f64 {
    if v.rows() == 0 || v.cols() == 0 {
        return 0.0;
    }
    let run = if rank < L::TILED { streamed::run::<L> } else { tiled::run::<L> };
    run(v, x, rank, y, threads, workspace)
}

/// The sum over a group of 32 columns of their sums of squares in one block.
fn total(squares: &[Line]) -> f64 {
    squares.iter().flat_map(|line| line.0).map(f64::from).sum()
}

/// Adds the sums of a group, of which `width` columns are in the matrix, to their values at `output`.
///
/// # Safety
/// The CPU has the level, `sums` holds two lines, and nothing else uses the `width` values at `output`.
unsafe fn add<L: Kernels>(sums: &[Line], output: *mut f32, width: usize) {
    // SAFETY: see above; a narrower group goes through a copy.
    unsafe {
        if width == GROUP {
            return L::add_joined(sums.as_ptr(), output);
        }
        let mut joined = [0.0; GROUP];
        std::ptr::copy_nonoverlapping(output, joined.as_mut_ptr(), width);
        L::add_joined(sums.as_ptr(), joined.as_mut_ptr());
        std::ptr::copy_nonoverlapping(joined.as_ptr(), output, width);
    }
}

/// The last columns of some rows of one matrix, copied and padded with zeros to a group of 32.
struct Padding<const ROWS: usize>([[u8; 4 * GROUP]; ROWS]);

impl<const ROWS: usize> Padding<ROWS> {
    const ZERO: Self = Self([[0; 4 * GROUP]; ROWS]);

    fn copy(&mut self, matrix: &Matrix<'_>, rows: Range<usize>, column: usize) -> Corner {
        for (row, copy) in rows.zip(&mut self.0) {
            let rest = &matrix.row(row)[column * matrix.dtype().size()..];
            copy[..rest.len()].copy_from_slice(rest);
        }
        Corner { pointer: self.0.as_ptr().cast(), row_step: 4 * GROUP, dtype: matrix.dtype() }
    }
}
