//! `y = V·x`: V is read once, a few rows at a time; lanes take part in the sum over the columns.
//!
//! An element of the result is summed over blocks of 512 columns, in order. Within a block, lane l of 16 sums by fused
//! multiply-adds, group of 32 columns by group, first column 2·l of the group, then column 2·l + 1; the lanes are added
//! up as a tree: l + 8, l + 4, l + 2, l + 1.

use rayon::prelude::*;

use super::Difference;
use super::micro::{Ahead, Corner, Kernels, ROWS, Staged, tiles, with_constant};
use super::simd::{GROUP, LANES, Line};
use super::workspace::{Borrowed, Shared, Workspace};

/// Columns of a block.
const BLOCK: usize = 512;
/// Vectors of 16 columns in a block.
const VECTORS: usize = BLOCK / LANES;
/// Bands of four rows that are staged together. With 512 columns in f32 they fill half of a 32 KiB L1 cache.
const BANDS: usize = 2;
/// Values of x that should stay in L2 while the rows go by.
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
    // Four rows of four vectors are one line of sums; an odd rank leaves part of the last one unused.
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
        Unit { v, packed, rank, first, lines, sums }.run::<L>();
        for (band, sums) in sums.chunks_exact(lines).enumerate() {
            let row = first + band * ROWS;
            let values = sums.iter().flat_map(|line| line.0.as_chunks::<ROWS>().0);
            for (k, values) in values.enumerate().take(rank) {
                for (offset, value) in values.iter().enumerate().take(rows - row) {
                    // SAFETY: `y` is (rank, rows) and no other unit covers this row.
                    unsafe { *y.at(k * rows + row + offset) = *value };
                }
            }
        }
    });
}

/// Rearranges a block of columns of `x` to (tile of vectors, vector of 16 columns, vector, lane), zeros at the end.
fn pack<L: Kernels>(x: &[f32], rank: usize, cols: usize, start: usize, packed: &mut [f32]) {
    let block = packed.len() / rank;
    let width = block.min(cols - start);
    let groups = width / GROUP;
    for (first, count) in tiles(rank, L::DOT) {
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

/// Neighbouring rows that one thread works on.
struct Unit<'a> {
    v: &'a Difference<'a>,
    packed: &'a [f32],
    rank: usize,
    first: usize,
    lines: usize,
    sums: &'a mut [Line],
}

impl Unit<'_> {
    fn run<L: Kernels>(self) {
        let Self { v, packed, rank, first, lines, sums } = self;
        let cols = v.cols();
        let mut staged = [Line::ZERO; BANDS * ROWS * VECTORS];
        let panel = (RESIDENT / rank).max(1).next_multiple_of(BLOCK);
        for panel_start in (0..cols).step_by(panel) {
            let panel_end = cols.min(panel_start + panel);
            for (index, sums) in sums.chunks_mut(BANDS * lines).enumerate() {
                let row = first + index * BANDS * ROWS;
                let rows = (BANDS * ROWS).min(v.rows() - row);
                for start in (panel_start..panel_end).step_by(BLOCK) {
                    let width = BLOCK.min(cols - start);
                    let vectors = 2 * width.div_ceil(GROUP);
                    let next = if start + BLOCK < panel_end {
                        (row, start + BLOCK)
                    } else {
                        (row + BANDS * ROWS, panel_start)
                    };
                    stage::<L>(v, (row, rows), (start, width), next, &mut staged);
                    let packed = &packed[start * rank..(start + vectors * LANES) * rank];
                    for (k, count) in tiles(rank, L::DOT) {
                        let x = packed[k * vectors * LANES..(k + count) * vectors * LANES].as_ptr();
                        for (band, sums) in sums.chunks_exact_mut(lines).enumerate() {
                            let next = v.base().corner(next.0 + band * ROWS, next.1);
                            let per_vector = if k == 0 { ROWS / 2 * next.dtype.size() / 2 } else { 0 };
                            let ahead = Ahead { pointer: next.pointer, row_step: next.row_step, per_vector };
                            let v = staged[band * ROWS * vectors..].as_ptr();
                            // SAFETY: `v` holds four rows of `vectors` lines, `x` `count` of them, and `sums` four values for
                            // each of the `rank` vectors; the engine has checked the CPU.
                            unsafe {
                                let sums = sums.as_mut_ptr().cast::<f32>().add(k * ROWS);
                                with_constant!(count, L::dot, [1 2 3 4 5 6], (v, x, vectors, sums, start == 0, ahead));
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Stages up to eight rows of a block as (band of four rows, vector, row, lane). Rows that V does not have keep what was there.
fn stage<L: Kernels>(
    v: &Difference<'_>,
    (row, rows): (usize, usize),
    (start, width): (usize, usize),
    next: (usize, usize),
    staged: &mut [Line; BANDS * ROWS * VECTORS],
) {
    let groups = width / GROUP;
    let vectors = 2 * width.div_ceil(GROUP);
    let (odd_step, group_step) = (ROWS * LANES, 2 * ROWS * LANES);
    for band in 0..rows.div_ceil(ROWS) {
        let row = row + band * ROWS;
        let rows = ROWS.min(v.rows() - row);
        let pointer = staged[band * ROWS * vectors..].as_mut_ptr().cast::<f32>();
        let target = Staged { pointer, row_step: LANES, odd_step, group_step };
        // SAFETY: V has these rows and groups, and the band has room for them; the engine has checked the CPU.
        unsafe {
            let next = v.aligned().corner(next.0 + band * ROWS, next.1).pointer;
            L::stage(v.aligned().corner(row, start), v.base().corner(row, start), next, rows, groups, target);
        }
        if !width.is_multiple_of(GROUP) {
            let column = start + groups * GROUP;
            let mut copies = [[[0_u8; 4 * GROUP]; ROWS]; 2];
            let mut corners = [v.aligned(), v.base()].map(|matrix| matrix.corner(row, column));
            for ((matrix, copies), corner) in [v.aligned(), v.base()].iter().zip(&mut copies).zip(&mut corners) {
                for (offset, copy) in copies.iter_mut().enumerate().take(rows) {
                    let rest = &matrix.row(row + offset)[column * matrix.dtype().size()..];
                    copy[..rest.len()].copy_from_slice(rest);
                }
                *corner = Corner { pointer: copies.as_ptr().cast(), row_step: 4 * GROUP, dtype: matrix.dtype() };
            }
            let target = Staged { pointer: pointer.wrapping_add(groups * group_step), ..target };
            // SAFETY: the copies hold four rows of 32 elements; the rest as above.
            unsafe { L::stage(corners[0], corners[1], corners[0].pointer, rows, 1, target) };
        }
    }
}
