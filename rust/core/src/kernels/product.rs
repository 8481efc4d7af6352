//! `y = V·x`: V is read once, a few rows at a time; the sum over the columns runs across lanes.
//!
//! An element of the result is summed over blocks of 512 columns, in order. Within a block, lane l of 16 adds with
//! fused multiply-adds, one group of 32 columns after another: first column 2·l of the group, then column 2·l + 1. Then
//! the lanes are added as a tree: l + 8, l + 4, l + 2, l + 1.

use rayon::prelude::*;

use super::micro::{Ahead, Band, Corner, Kernels, ROWS, tiles, with_constant};
use super::simd::{GROUP, LANES, Line};
use super::workspace::{Borrowed, Shared, Workspace};
use super::{Difference, Matrix};

/// Columns of a block.
const BLOCK: usize = 512;
/// Vectors of 16 columns in a block.
const VECTORS: usize = BLOCK / LANES;
/// Bands of four rows that are staged together. 512 columns of them in f32 fill half of a 32 KiB L1 cache.
const BANDS: usize = 2;
/// Prefetch distance along the rows, in columns.
const AHEAD: usize = 2 * BLOCK;
/// Values of x that should stay in L2 while the rows are processed.
const RESIDENT: usize = 100_000;

pub(super) fn run<L: Kernels>(
    v: &Difference<'_>,
    x: &[f32],
    rank: usize,
    y: &mut [f32],
    threads: usize,
    workspace: &mut Workspace,
) {
    let (rows, cols) = (v.rows(), v.cols());
    if rows == 0 || cols == 0 || rank == 0 {
        y.fill(0.0);
        return;
    }
    let groups = cols.div_ceil(GROUP);
    // Four rows of four vectors are one line of sums. If the rank is odd, part of the last line is unused.
    let lines = rank.div_ceil(LANES / ROWS);
    let bands = rows.div_ceil(ROWS);
    let Borrowed { vectors, sums, .. } = workspace.borrow(groups * GROUP * rank, bands * lines, 0);

    let blocks = vectors.par_chunks_mut(BLOCK * rank).enumerate();
    blocks.for_each(|(block, packed)| pack::<L>(x, rank, cols, block * BLOCK, packed));
    let packed = &*vectors;
    let y = Shared::new(y);
    let unit = bands.div_ceil(threads).next_multiple_of(BANDS);
    sums.par_chunks_mut(unit * lines).enumerate().for_each(|(index, sums)| {
        let first = index * unit * ROWS;
        Unit { v, packed, rank, first, lines }.run::<L>(sums);
        for (band, sums) in sums.chunks_exact(lines).enumerate() {
            let row = first + band * ROWS;
            let values = sums.iter().flat_map(|line| line.0.as_chunks::<ROWS>().0);
            for (k, values) in values.enumerate().take(rank) {
                for (offset, value) in values.iter().enumerate().take(rows - row) {
                    // SAFETY: `y` is (rank, rows), and no other unit covers this row.
                    unsafe { *y.at(k * rows + row + offset) = *value };
                }
            }
        }
    });
}

/// Rearranges a block of columns of `x` to (tile of vectors, vector of 16 columns, vector, lane), padded with zeros.
fn pack<L: Kernels>(x: &[f32], rank: usize, cols: usize, start: usize, packed: &mut [f32]) {
    let block = packed.len() / rank;
    let width = block.min(cols - start);
    let groups = width / GROUP;
    for (first, count) in tiles(rank, L::DOT_BAND, L::DOT) {
        let tile = &mut packed[first * block..(first + count) * block];
        for (k, vector) in x.chunks_exact(cols).skip(first).take(count).enumerate() {
            let values = &vector[start..start + width];
            let (odd_step, group_step) = (count * LANES, 2 * count * LANES);
            let output = tile[k * LANES..].as_mut_ptr();
            // SAFETY: `values` holds the groups and the tile has room for them; the engine has checked the CPU.
            unsafe { L::split(values.as_ptr(), groups, output, odd_step, group_step) };
            if width < block {
                let mut rest = [0.0; GROUP];
                rest[..width % GROUP].copy_from_slice(&values[groups * GROUP..]);
                // SAFETY: as above, for the last group.
                unsafe { L::split(rest.as_ptr(), 1, output.add(groups * group_step), odd_step, group_step) };
            }
        }
    }
}

/// Adjacent rows that one thread works on.
struct Unit<'a> {
    v: &'a Difference<'a>,
    packed: &'a [f32],
    rank: usize,
    first: usize,
    lines: usize,
}

impl Unit<'_> {
    fn run<L: Kernels>(&self, sums: &mut [Line]) {
        let cols = self.v.cols();
        let mut staged = [Line::ZERO; BANDS * ROWS * VECTORS];
        let mut padding = [const { Padding([[0; 4 * BLOCK]; ROWS]) }; 2];
        let panel = (RESIDENT / self.rank).max(1).next_multiple_of(BLOCK);
        for panel_start in (0..cols).step_by(panel) {
            let panel_end = cols.min(panel_start + panel);
            for (index, sums) in sums.chunks_mut(BANDS * self.lines).enumerate() {
                let row = self.first + index * BANDS * ROWS;
                for start in (panel_start..panel_end).step_by(BLOCK) {
                    let ahead = start - panel_start + AHEAD;
                    let width = (panel_end - panel_start).next_multiple_of(BLOCK);
                    let ahead = (row + ahead / width * BANDS * ROWS, panel_start + ahead % width);
                    Block { unit: self, row, start, ahead }.run::<L>(sums, &mut staged, &mut padding);
                }
            }
        }
    }
}

/// Two bands of a block of columns.
struct Block<'a> {
    unit: &'a Unit<'a>,
    row: usize,
    start: usize,
    /// Row and column of the block to prefetch.
    ahead: (usize, usize),
}

impl Block<'_> {
    fn run<L: Kernels>(&self, sums: &mut [Line], staged: &mut [Line], padding: &mut [Padding; 2]) {
        let Unit { v, packed, rank, lines, .. } = *self.unit;
        let width = BLOCK.min(v.cols() - self.start);
        let vectors = 2 * width.div_ceil(GROUP);
        let packed = &packed[self.start * rank..(self.start + vectors * LANES) * rank];
        let first = self.start == 0;
        for (k, count) in tiles(rank, L::DOT_BAND, L::DOT) {
            let x = packed[k * vectors * LANES..(k + count) * vectors * LANES].as_ptr();
            for (band, sums) in sums.chunks_exact_mut(lines).enumerate() {
                let sums = sums.as_mut_ptr().cast::<f32>().wrapping_add(k * ROWS);
                let staged = staged[band * ROWS * VECTORS..].as_mut_ptr();
                let ahead = |matrix: Matrix<'_>| matrix.corner(self.ahead.0 + band * ROWS, self.ahead.1);
                let ahead = [ahead(v.aligned()), ahead(v.base())];
                // SAFETY: the band and the staged band hold four rows of `vectors` lines, `x` `count` of them, and `sums` four
                // values for each of these vectors; the engine has checked the CPU.
                unsafe {
                    if k == 0 {
                        let staged = if count < rank { staged } else { std::ptr::null_mut() };
                        let rows = self.rows(band * ROWS, width, padding);
                        let dtypes = ahead.map(|corner| corner.dtype);
                        let band = Band { rows, dtypes, ahead, ahead_of_base: count == rank };
                        with_constant!(count, L::dot_band, [1 2 3 4], (band, x, vectors, sums, first, staged));
                    } else {
                        let Corner { pointer, row_step, dtype } = ahead[1];
                        let lines = if k <= L::DOT_BAND { ROWS / 2 * dtype.size() / 2 } else { 0 };
                        let ahead = Ahead { pointer, row_step, per_vector: lines };
                        with_constant!(count, L::dot, [1 2 3 4 5 6], (staged, x, vectors, sums, first, ahead));
                    }
                }
            }
        }
    }

    /// Addresses of the rows of a band, in padded copies if the last group of columns is not full. Rows beyond the end
    /// of V are replaced by its last row.
    fn rows(&self, offset: usize, width: usize, padding: &mut [Padding; 2]) -> [[*const u8; ROWS]; 2] {
        let v = self.unit.v;
        let mut bands = [[std::ptr::null(); ROWS]; 2];
        for ((matrix, copies), band) in [v.aligned(), v.base()].iter().zip(padding).zip(&mut bands) {
            for (index, (pointer, copy)) in band.iter_mut().zip(&mut copies.0).enumerate() {
                let row = (self.row + offset + index).min(v.rows() - 1);
                *pointer = matrix.corner(row, self.start).pointer;
                if !width.is_multiple_of(GROUP) {
                    let rest = &matrix.row(row)[self.start * matrix.dtype().size()..];
                    copy[..rest.len()].copy_from_slice(rest);
                    *pointer = copy.as_ptr();
                }
            }
        }
        bands
    }
}

/// Copies of the last block of a band of one matrix, padded with zeros.
struct Padding([[u8; 4 * BLOCK]; ROWS]);
