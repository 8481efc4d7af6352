//! Many vectors: a tile of 64 rows and 64 columns of V is staged in L1 and multiplied by six vectors at a time, whose
//! sums stay in registers for all its rows.

use std::ops::Range;

use rayon::prelude::*;

use super::{BLOCK, Padding, add, total};
use crate::kernels::Difference;
use crate::kernels::micro::{AheadOfRows, Corner, Kernels, TILE, VECTORS, tiles, with_constant};
use crate::kernels::simd::{GROUP, Line};
use crate::kernels::workspace::{Borrowed, Shared, Workspace};

/// Rows in a tile: 16 KiB in f32, half of a small L1 cache.
const ROWS: usize = 64;
/// Columns in a tile.
const COLUMNS: usize = TILE * GROUP;
/// Lines of sums in a panel of tiles: they should stay in L2 while the rows of a block are processed.
const PANEL: usize = 8192;
/// Prefetch distance, in tiles.
const AHEAD: usize = 2;

pub(super) fn run<L: Kernels>(
    v: &Difference<'_>,
    x: &[f32],
    rank: usize,
    y: &mut [f32],
    threads: usize,
    workspace: &mut Workspace,
) -> f64 {
    let (rows, cols) = (v.rows(), v.cols());
    let tiles = cols.div_ceil(COLUMNS);
    let lines = 2 * TILE * (1 + rank);
    let Borrowed { vectors, sums, squares } = workspace.borrow(rank * rows, tiles * lines, tiles * TILE);

    let chunks = vectors.par_chunks_mut(ROWS * rank).enumerate();
    chunks.for_each(|(chunk, packed)| pack(x, rank, rows, chunk * ROWS, packed));
    let packed = &*vectors;
    let y = Shared::new(y);
    let unit = tiles.div_ceil(threads);
    let units = sums.par_chunks_mut(unit * lines).zip(squares.par_chunks_mut(unit * TILE)).enumerate();
    units.for_each(|(index, (sums, squares))| Unit { v, packed, rank, first: index * unit }.run::<L>(sums, squares, y));
    squares.iter().sum()
}

/// Rearranges up to 64 rows of `x` from `start` to (tile of vectors, row, vector).
fn pack(x: &[f32], rank: usize, rows: usize, start: usize, packed: &mut [f32]) {
    let count = packed.len() / rank;
    for (first, width) in tiles(rank, VECTORS, VECTORS) {
        let tile = &mut packed[first * count..(first + width) * count];
        for (k, vector) in x.chunks_exact(rows).skip(first).take(width).enumerate() {
            for (row, value) in tile.chunks_exact_mut(width).zip(&vector[start..start + count]) {
                row[k] = *value;
            }
        }
    }
}

/// Adjacent tiles of columns that one thread works on.
struct Unit<'a> {
    v: &'a Difference<'a>,
    packed: &'a [f32],
    rank: usize,
    first: usize,
}

impl Unit<'_> {
    fn run<L: Kernels>(&self, sums: &mut [Line], squares: &mut [f64], y: Shared) {
        let lines = 2 * TILE * (1 + self.rank);
        let mut staged = [Line::ZERO; ROWS * 2 * TILE];
        let mut padding = [const { Padding::ZERO }; 2];
        let panel = (PANEL / lines).max(4);
        squares.fill(0.0);
        for block in (0..self.v.rows()).step_by(BLOCK) {
            let end = self.v.rows().min(block + BLOCK);
            for (index, sums) in sums.chunks_mut(panel * lines).enumerate() {
                let (first, count) = (self.first + index * panel, sums.len() / lines);
                let after = if first + count < self.first + squares.len() / TILE {
                    (block, first + count)
                } else {
                    (end, self.first)
                };
                for start in (block..end).step_by(ROWS) {
                    let rows = start..end.min(start + ROWS);
                    for (index, sums) in sums.chunks_exact_mut(lines).enumerate() {
                        self.stage::<L>(&rows, first + index, &mut staged, &mut padding, sums, start == block);
                        let next = if rows.end < end { (rows.end, first) } else { after };
                        let ahead = match index + AHEAD {
                            ahead if ahead < count => (start, first + ahead),
                            ahead => (next.0, next.1 + (ahead - count)),
                        };
                        self.multiply::<L>(&rows, &staged, ahead, &mut sums[2 * TILE..], start == block);
                    }
                }
                for (tile, sums) in sums.chunks_exact(lines).enumerate() {
                    let squares = &mut squares[(index * panel + tile) * TILE..];
                    for (square, lines) in squares.iter_mut().zip(sums[..2 * TILE].chunks_exact(2)) {
                        *square += total(lines);
                    }
                }
                self.add::<L>(sums, first, y);
            }
        }
    }

    /// Adds the sums of the tiles from `first` to their columns of `y`, one vector after another.
    fn add<L: Kernels>(&self, sums: &[Line], first: usize, y: Shared) {
        let (rank, cols) = (self.rank, self.v.cols());
        for k in 0..rank {
            for (tile, sums) in sums.chunks_exact(2 * TILE * (1 + rank)).enumerate() {
                for (group, sums) in sums[2 * TILE * (1 + k)..].chunks_exact(2).take(TILE).enumerate() {
                    let column = (first + tile) * COLUMNS + group * GROUP;
                    let width = GROUP.min(cols.saturating_sub(column));
                    // SAFETY: `y` is (rank, cols), and no other unit covers these columns; the engine has checked the CPU.
                    unsafe { add::<L>(sums, y.at(k * cols + column), width) };
                }
            }
        }
    }

    /// Stages rows of a tile, and adds their squares to those of its columns.
    fn stage<L: Kernels>(
        &self,
        rows: &Range<usize>,
        tile: usize,
        staged: &mut [Line],
        padding: &mut [Padding<ROWS>; 2],
        squares: &mut [Line],
        first: bool,
    ) {
        let matrices = [self.v.aligned(), self.v.base()];
        let whole = (self.v.cols() / GROUP - tile * TILE).min(TILE);
        if whole > 0 {
            let [aligned, base] = matrices.map(|matrix| matrix.corner(rows.start, tile * COLUMNS));
            let (staged, squares) = (staged.as_mut_ptr(), squares.as_mut_ptr());
            // SAFETY: V has these rows and groups; `staged` has 64 rows, and `squares` the lines of a tile.
            unsafe {
                with_constant!(whole, L::stage_columns, [1 2], (aligned, base, rows.len(), staged, squares, first));
            }
        }
        if whole == TILE {
            return;
        }
        let column = tile * COLUMNS + whole * GROUP;
        let lines = 2 * whole;
        let [aligned, base] = padding;
        let [aligned, base] =
            [aligned.copy(&matrices[0], rows.clone(), column), base.copy(&matrices[1], rows.clone(), column)];
        // SAFETY: the copies have these rows of 32 elements; the rest as above.
        unsafe {
            let (staged, squares) = (staged[lines..].as_mut_ptr(), squares[lines..].as_mut_ptr());
            L::stage_columns::<1>(aligned, base, rows.len(), staged, squares, first);
        }
        if first {
            for line in lines + 2..2 * TILE {
                squares[line] = Line::ZERO;
            }
        }
    }

    /// Multiplies a staged tile by all vectors, prefetching the tile at `ahead` (row, tile).
    fn multiply<L: Kernels>(
        &self,
        rows: &Range<usize>,
        staged: &[Line],
        ahead: (usize, usize),
        sums: &mut [Line],
        first: bool,
    ) {
        let matrices = [self.v.aligned(), self.v.base()];
        let corners = matrices.map(|matrix| matrix.corner(ahead.0, ahead.1 * COLUMNS));
        let calls = tiles(self.rank, VECTORS, VECTORS);
        let lines: usize = matrices.iter().map(|matrix| COLUMNS * matrix.dtype().size() / 64).sum();
        let share = lines.div_ceil(calls.clone().count());
        for (call, (k, count)) in calls.enumerate() {
            let ahead = share_of_lines(corners, call * share..(call + 1) * share);
            let x = self.packed[rows.start * self.rank + k * rows.len()..].as_ptr();
            let sums = sums[k * 2 * TILE..].as_mut_ptr();
            let (staged, rows) = (staged.as_ptr(), rows.len());
            // SAFETY: `staged` has these rows, `x` has `count` values for each, and `sums` has the lines of a tile for
            // each vector; the engine has checked the CPU.
            unsafe {
                with_constant!(count, L::accumulate, [1 2 3 4 5 6], (staged, rows, x, sums, first, ahead));
            }
        }
    }
}

/// The lines of a row of a tile of both weights that one call of `accumulate` prefetches.
fn share_of_lines(corners: [Corner; 2], share: Range<usize>) -> [AheadOfRows; 2] {
    let mut before = 0;
    corners.map(|Corner { pointer, row_step, dtype }| {
        let lines = COLUMNS * dtype.size() / 64;
        let [from, to] = [share.start, share.end].map(|line| line.clamp(before, before + lines) - before);
        before += lines;
        AheadOfRows { pointer: pointer.wrapping_add(64 * from), row_step, lines: to - from }
    })
}
