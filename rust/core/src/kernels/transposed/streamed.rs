//! Few vectors: four rows of V at a time are held in registers while each sum is loaded, updated and stored. That costs
//! little per weight, reads V in long rows, and needs only two registers of sums for any rank.

use rayon::prelude::*;

use super::{BLOCK, Padding, add, total};
use crate::kernels::Difference;
use crate::kernels::micro::{Kernels, ROWS, with_constant};
use crate::kernels::simd::{GROUP, Line};
use crate::kernels::workspace::{Borrowed, Shared, Workspace};

/// Rows that are processed one panel of columns after another.
const SWEEP: usize = 32;
/// Lines of sums in a panel: they should stay in L2 while the rows of a sweep are processed.
const PANEL: usize = 2048;

pub(super) fn run<L: Kernels>(
    v: &Difference<'_>,
    x: &[f32],
    rank: usize,
    y: &mut [f32],
    threads: usize,
    workspace: &mut Workspace,
) -> f64 {
    let (rows, cols) = (v.rows(), v.cols());
    let groups = cols.div_ceil(GROUP);
    let lines = 2 * (1 + rank);
    let Borrowed { vectors, sums, squares } = workspace.borrow(rank * rows, groups * lines, groups);

    if rank > 0 {
        let bands = vectors.par_chunks_mut(ROWS * rank).enumerate();
        bands.for_each(|(band, packed)| pack(x, rank, rows, band * ROWS, packed));
    }
    let packed = &*vectors;
    let y = Shared::new(y);
    let unit = groups.div_ceil(threads);
    let units = sums.par_chunks_mut(unit * lines).zip(squares.par_chunks_mut(unit)).enumerate();
    units.for_each(|(index, (sums, squares))| {
        let unit = Unit { v, packed, rank, first: index * unit, groups: squares.len() };
        squares.fill(0.0);
        for start in (0..rows).step_by(BLOCK) {
            let end = rows.min(start + BLOCK);
            sums.fill(Line::ZERO);
            unit.update::<L>(start, end, sums);
            for (square, sums) in squares.iter_mut().zip(sums.chunks_exact(lines)) {
                *square += total(&sums[..2]);
            }
            unit.add::<L>(sums, y);
        }
    });
    squares.iter().sum()
}

/// Rearranges four rows of `x` to (vector, row), or the remaining fewer rows to (row, vector).
fn pack(x: &[f32], rank: usize, rows: usize, start: usize, packed: &mut [f32]) {
    let band = packed.len() / rank;
    let (row_step, step) = if band == ROWS { (1, ROWS) } else { (rank, 1) };
    for (k, vector) in x.chunks_exact(rows).enumerate() {
        for (row, value) in vector[start..start + band].iter().enumerate() {
            packed[k * step + row * row_step] = *value;
        }
    }
}

/// Adjacent groups of 32 columns that one thread works on.
struct Unit<'a> {
    v: &'a Difference<'a>,
    packed: &'a [f32],
    rank: usize,
    first: usize,
    groups: usize,
}

impl Unit<'_> {
    fn update<L: Kernels>(&self, start: usize, end: usize, sums: &mut [Line]) {
        let lines = 2 * (1 + self.rank);
        let whole = self.groups.min(self.v.cols() / GROUP - self.first);
        let panel = (PANEL / lines).max(4);
        for start in (start..end).step_by(SWEEP) {
            let end = end.min(start + SWEEP);
            for group in (0..whole).step_by(panel) {
                let groups = panel.min(whole - group);
                let after = if group + panel < whole { (start, group + panel) } else { (end, 0) };
                self.sweep::<L>((start, end), (group, groups), after, &mut sums[group * lines..]);
            }
            if whole < self.groups {
                self.sweep_tail::<L>((start, end), &mut sums[whole * lines..]);
            }
        }
    }

    /// Adds rows `start` to `end` of some groups to their sums, prefetching the block at `after` (row, group).
    fn sweep<L: Kernels>(
        &self,
        (start, end): (usize, usize),
        (group, groups): (usize, usize),
        after: (usize, usize),
        sums: &mut [Line],
    ) {
        let (aligned, base) = (self.v.aligned(), self.v.base());
        let column = |group| (self.first + group) * GROUP;
        let mut row = start;
        while row < end {
            let rows = if end - row < ROWS { 1 } else { ROWS };
            let (next_row, next_group) = if row + rows < end { (row + rows, group) } else { after };
            let next = [aligned, base].map(|matrix| matrix.corner(next_row, column(next_group)).pointer);
            let (aligned, base) = (aligned.corner(row, column(group)), base.corner(row, column(group)));
            let (x, sums) = (self.packed[row * self.rank..].as_ptr(), sums.as_mut_ptr());
            // SAFETY: V has these rows and groups, `packed` has `rows` values for each vector, and `sums` has two lines
            // for each group and vector and for the squares; the engine has checked the CPU.
            unsafe {
                with_constant!(rows, L::update, [1 4], (aligned, base, next, groups, x, self.rank, sums));
            }
            row += rows;
        }
    }

    /// Adds rows `start` to `end` of the last group, which is narrower, to its sums.
    fn sweep_tail<L: Kernels>(&self, (start, end): (usize, usize), sums: &mut [Line]) {
        let (mut aligned_padding, mut base_padding) = (Padding::<ROWS>::ZERO, Padding::<ROWS>::ZERO);
        let column = self.v.cols() / GROUP * GROUP;
        let mut row = start;
        while row < end {
            let rows = if end - row < ROWS { 1 } else { ROWS };
            let aligned = aligned_padding.copy(&self.v.aligned(), row..row + rows, column);
            let base = base_padding.copy(&self.v.base(), row..row + rows, column);
            let next = [aligned.pointer, base.pointer];
            let (x, sums) = (self.packed[row * self.rank..].as_ptr(), sums.as_mut_ptr());
            // SAFETY: the copies have `rows` rows of 32 elements; the rest as in `sweep`.
            unsafe {
                with_constant!(rows, L::update, [1 4], (aligned, base, next, 1, x, self.rank, sums));
            }
            row += rows;
        }
    }

    /// Adds the sums of the unit to its columns of `y`.
    fn add<L: Kernels>(&self, sums: &[Line], y: Shared) {
        let cols = self.v.cols();
        for (group, sums) in sums.chunks_exact(2 * (1 + self.rank)).enumerate() {
            let column = (self.first + group) * GROUP;
            for (k, sums) in sums[2..].chunks_exact(2).enumerate() {
                // SAFETY: `y` is (rank, cols), and no other unit covers these columns; the engine has checked the CPU.
                unsafe { add::<L>(sums, y.at(k * cols + column), GROUP.min(cols - column)) };
            }
        }
    }
}
