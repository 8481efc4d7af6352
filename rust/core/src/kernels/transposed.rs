//! `y += Vᵀ·x`: V is read once, in blocks of 128 rows; lanes are columns.
//!
//! Every column of every vector is summed by fused multiply-adds in the order of the rows, from zero in each block of
//! 128 rows; the sums of the blocks are added up in order, and the total is added to `y`. The squares of V are summed
//! likewise within a column of a block, and in f64 from there on: over the columns of a tile, the blocks, the tiles.

use rayon::prelude::*;

use super::micro::{Ahead, Corner, Kernels, tiles, with_constant};
use super::simd::{GROUP, Line};
use super::workspace::{Borrowed, Shared, Workspace};
use super::{Difference, Matrix};

/// Rows of a block. With 32 columns in f32 it fills half of a 32 KiB L1 cache.
const BLOCK: usize = 128;
/// How far ahead a row is prefetched, in tiles of 32 columns.
const DISTANCE: usize = 16;

pub(super) fn run<L: Kernels>(
    v: &Difference<'_>,
    x: &[f32],
    rank: usize,
    y: &mut [f32],
    threads: usize,
    workspace: &mut Workspace,
) -> f64 {
    let (rows, cols) = (v.rows(), v.cols());
    if rows == 0 || cols == 0 {
        return 0.0;
    }
    let count = cols.div_ceil(GROUP);
    // At least one line, so that rank 0 can be cut like the others.
    let lines = (2 * rank).max(1);
    let Borrowed { vectors, sums, squares } = workspace.borrow(rank * rows, count * lines, count);

    if rank > 0 {
        let blocks = vectors.par_chunks_mut(BLOCK * rank).enumerate();
        blocks.for_each(|(block, packed)| pack(x, rank, rows, block * BLOCK, L::ACCUMULATE, packed));
    }
    let packed = &*vectors;
    let y = Shared::new(y);
    let unit = count.div_ceil(threads);
    let units = sums.par_chunks_mut(unit * lines).zip(squares.par_chunks_mut(unit)).enumerate();
    units.for_each(|(index, (sums, squares))| {
        let first = index * unit;
        Unit { v, packed, rank, first, lines, sums, squares }.run::<L>();
        // SAFETY: `y` is (rank, cols) and no other unit covers these columns.
        unsafe { add::<L>(sums, lines, rank, first, cols, y) };
    });
    squares.iter().sum()
}

/// Rearranges a block of rows of `x` to (tile of vectors, row, vector).
fn pack(x: &[f32], rank: usize, rows: usize, start: usize, most: usize, packed: &mut [f32]) {
    let block = packed.len() / rank;
    for (first, count) in tiles(rank, most) {
        let tile = &mut packed[first * block..(first + count) * block];
        for (k, vector) in x.chunks_exact(rows).skip(first).take(count).enumerate() {
            for (slot, value) in tile.iter_mut().skip(k).step_by(count).zip(&vector[start..start + block]) {
                *slot = *value;
            }
        }
    }
}

/// Neighbouring tiles of 32 columns that one thread works on.
struct Unit<'a> {
    v: &'a Difference<'a>,
    packed: &'a [f32],
    rank: usize,
    first: usize,
    lines: usize,
    sums: &'a mut [Line],
    squares: &'a mut [f64],
}

impl Unit<'_> {
    fn run<L: Kernels>(self) {
        let Self { v, packed, rank, first, lines, sums, squares } = self;
        let (rows, count) = (v.rows(), squares.len());
        squares.fill(0.0);
        let mut staged = [Line::ZERO; 2 * BLOCK];
        let (mut aligned_padding, mut base_padding) = (Padding::ZERO, Padding::ZERO);
        for start in (0..rows).step_by(BLOCK) {
            let block = BLOCK.min(rows - start);
            for tile in 0..count {
                let column = (first + tile) * GROUP;
                let (aligned, base) = if column + GROUP <= v.cols() {
                    (v.aligned().corner(start, column), v.base().corner(start, column))
                } else {
                    let aligned = aligned_padding.copy(&v.aligned(), start, block, column);
                    (aligned, base_padding.copy(&v.base(), start, block, column))
                };
                let wrapped = tile + DISTANCE;
                let ahead = ahead(v, start + BLOCK * (wrapped / count), (first + wrapped % count) * GROUP);
                // SAFETY: both corners hold `block` rows of 32 elements, and so does `staged`; the engine has checked the CPU.
                let of_columns = unsafe { L::stage_squares(aligned, base, block, staged.as_mut_ptr(), ahead) };
                squares[tile] += of_columns.iter().flat_map(|line| line.0).map(f64::from).sum::<f64>();
                let sums = &mut sums[tile * lines..];
                let packed = &packed[start * rank..(start + block) * rank];
                for (k, vectors) in tiles(rank, L::ACCUMULATE) {
                    let x = packed[k * block..(k + vectors) * block].as_ptr();
                    let sums = sums[2 * k..2 * (k + vectors)].as_mut_ptr();
                    let v = staged.as_ptr();
                    // SAFETY: `v` holds `block` staged rows, `x` that many times `vectors` values, `sums` two lines a vector.
                    unsafe {
                        with_constant!(vectors, L::accumulate, [1 2 3 4 5 6 7 8 9 10 11 12], (v, x, block, sums, start == 0));
                    }
                }
            }
        }
    }
}

fn ahead(v: &Difference<'_>, row: usize, column: usize) -> Ahead {
    let (aligned, base) = (v.aligned().corner(row, column), v.base().corner(row, column));
    Ahead { pointers: [aligned.pointer, base.pointer], row_steps: [aligned.row_step, base.row_step] }
}

/// The last columns of a block of one matrix, copied and filled up with zeros to a group of 32.
struct Padding([[u8; 4 * GROUP]; BLOCK]);

impl Padding {
    const ZERO: Self = Self([[0; 4 * GROUP]; BLOCK]);

    fn copy(&mut self, matrix: &Matrix<'_>, start: usize, block: usize, column: usize) -> Corner {
        for (row, copy) in self.0.iter_mut().enumerate().take(block) {
            let rest = &matrix.row(start + row)[column * matrix.dtype().size()..];
            copy[..rest.len()].copy_from_slice(rest);
        }
        Corner { pointer: self.0.as_ptr().cast(), row_step: 4 * GROUP, dtype: matrix.dtype() }
    }
}

/// Adds the sums of a unit to its columns of `y`.
///
/// # Safety
/// `y` is (rank, cols), and nothing else writes to the columns from `first`·32 on that `sums` covers.
unsafe fn add<L: Kernels>(sums: &[Line], lines: usize, rank: usize, first: usize, cols: usize, y: Shared) {
    for (tile, sums) in sums.chunks_exact(lines).enumerate() {
        let column = (first + tile) * GROUP;
        for k in 0..rank {
            let split = sums[2 * k..2 * k + 2].as_ptr();
            let width = GROUP.min(cols - column);
            // SAFETY: `width` values lie at `output`, ours alone; a narrower group takes a detour.
            unsafe {
                let output = y.at(k * cols + column);
                if width == GROUP {
                    L::add_joined(split, output);
                } else {
                    let mut joined = [0.0; GROUP];
                    std::ptr::copy_nonoverlapping(output, joined.as_mut_ptr(), width);
                    L::add_joined(split, joined.as_mut_ptr());
                    std::ptr::copy_nonoverlapping(joined.as_ptr(), output, width);
                }
            }
        }
    }
}
