//! Columns of a stored weight, and writing them back.

use std::ops::Range;

use rayon::prelude::*;

use crate::checkpoint::{CheckpointError, View};
use crate::kernels::{Dtype, Engine};
use crate::projection::factors::{Walk, append};
use crate::projection::round::round_row;
use crate::projection::{Job, Overflow};

/// Columns that one thread loads at a time.
const CHUNK: usize = 16;
/// Stored rows that one thread writes.
const ROWS: usize = 16;

/// A stored matrix as slices of rows; it is W (m, n) or, if transposed, Wᵀ.
pub(super) struct Stored<'a> {
    pub(super) views: Vec<&'a View>,
    transposed: bool,
    rows: usize,
}

impl<'a> Stored<'a> {
    pub(super) fn new(views: impl Iterator<Item = &'a View>, job: &Job) -> Self {
        Self { views: views.collect(), transposed: job.is_transposed(), rows: job.shape().0 }
    }

    /// The same stored matrix as Wᵀ, whose columns have `cols` values.
    pub(super) fn turned(&self, cols: usize) -> Self {
        Self { views: self.views.clone(), transposed: !self.transposed, rows: cols }
    }

    /// Shape of the stored matrix.
    pub(super) fn stored_shape(&self) -> (usize, usize) {
        (self.views.iter().map(|view| view.rows()).sum(), self.views[0].cols())
    }

    /// The bytes and the dtype of a stored row.
    pub(super) fn row(&self, row: usize) -> (&'a [u8], Dtype) {
        let (view, row) = self.stored_row(row);
        let size = view.dtype().size();
        let start = row * view.row_stride() * size;
        (&view.bytes()[start..start + view.cols() * size], view.dtype())
    }

    /// Columns of W, each contiguous.
    pub(super) fn columns(&self, engine: &Engine, columns: Range<usize>) -> Result<Vec<f32>, CheckpointError> {
        let mut tile = vec![0.0; columns.len() * self.rows];
        engine.install(|| {
            tile.par_chunks_mut(CHUNK * self.rows).enumerate().try_for_each(|(index, chunk)| {
                let first = columns.start + index * CHUNK;
                if self.transposed { self.load_rows(first, chunk) } else { self.load_columns(first, chunk) }
            })
        })?;
        Ok(tile)
    }

    fn load_columns(&self, first: usize, chunk: &mut [f32]) -> Result<(), CheckpointError> {
        let (mut values, mut start) = (Vec::new(), 0);
        for view in &self.views {
            values.clear();
            let outer = (chunk.len() / self.rows, 1);
            let walk = Walk { start: first, outer, inner: (view.rows(), view.row_stride()) };
            append(view.bytes(), view.dtype(), walk, &mut values)
                .map_err(|found| view.not_finite(found.inner, first + found.outer, found.value))?;
            for (column, values) in chunk.chunks_exact_mut(self.rows).zip(values.chunks_exact(view.rows())) {
                column[start..start + view.rows()].copy_from_slice(values);
            }
            start += view.rows();
        }
        Ok(())
    }

    fn load_rows(&self, first: usize, chunk: &mut [f32]) -> Result<(), CheckpointError> {
        let mut values = Vec::new();
        for (index, column) in chunk.chunks_exact_mut(self.rows).enumerate() {
            let (view, row) = self.stored_row(first + index);
            values.clear();
            let walk = Walk { start: row * view.row_stride(), outer: (1, 0), inner: (view.cols(), 1) };
            append(view.bytes(), view.dtype(), walk, &mut values)
                .map_err(|found| view.not_finite(row, found.inner, found.value))?;
            column.copy_from_slice(&values);
        }
        Ok(())
    }

    /// The slice that holds a stored row, and the row's position in it.
    fn stored_row(&self, mut row: usize) -> (&'a View, usize) {
        for view in &self.views {
            if row < view.rows() {
                return (view, row);
            }
            row -= view.rows();
        }
        panic!("{row} rows beyond the last slice");
    }

    /// Writes W + factor·update for some columns of W, in `dtype`.
    pub(super) fn write(
        &self,
        engine: &Engine,
        update: &[f32],
        factor: f64,
        columns: Range<usize>,
        dtype: Dtype,
        output: &mut [u8],
    ) -> Option<Overflow> {
        let (size, width) = (dtype.size(), self.views[0].cols());
        // Columns of W are stored rows if transposed.
        let (from, slots) = if self.transposed {
            (columns.start, &mut output[columns.start * width * size..columns.end * width * size])
        } else {
            (0, output)
        };
        let found: Vec<_> = engine.install(|| {
            let chunks = slots.par_chunks_mut(ROWS * width * size).enumerate();
            let written = chunks.map(|(index, chunk)| {
                let (mut values, mut found) = (Vec::new(), None);
                for (offset, slot) in chunk.chunks_exact_mut(width * size).enumerate() {
                    let row = from + index * ROWS + offset;
                    let (view, stored) = self.stored_row(row);
                    let cols = if self.transposed { 0..width } else { columns.clone() };
                    values.clear();
                    let start = stored * view.row_stride() + cols.start;
                    let walk = Walk { start, outer: (1, 0), inner: (cols.len(), 1) };
                    // Checked to be finite when the columns were loaded.
                    let _ = append(view.bytes(), view.dtype(), walk, &mut values);
                    let (first, step) =
                        if self.transposed { ((row - columns.start) * self.rows, 1) } else { (row, self.rows) };
                    for (value, moved) in values.iter_mut().zip(update[first..].iter().step_by(step)) {
                        *value = (f64::from(*value) + factor * f64::from(*moved)) as f32;
                    }
                    let overflow = round_row(&values, dtype, &mut slot[cols.start * size..cols.end * size]);
                    found = found.or(overflow.map(|col| Overflow {
                        row,
                        col: cols.start + col,
                        value: f64::from(values[col]),
                    }));
                }
                found
            });
            written.collect()
        });
        found.into_iter().flatten().next()
    }
}
