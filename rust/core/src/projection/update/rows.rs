//! The three models row by row: aligned + (a·Δ + b·V + LᵀR), rounded, and the norms.

use rayon::prelude::*;

use super::as_bytes;
use super::blend::Blend;
use super::columns::Stored;
use crate::kernels::{Difference, Dtype, Engine, Matrix, ShapeError};
use crate::linalg::multiversion;
use crate::projection::round::round_row;
use crate::projection::{Overflow, ProjectionError, Stacked};

/// Bytes of LᵀR, or elements read, between two questions for an interrupt.
const TILE_BYTES: usize = 8 << 20;
/// Stored rows that one thread takes at a time.
const ROWS: usize = 16;
/// Columns that are converted, blended and rounded together, in L1.
const CHUNK: usize = 1024;
/// Partial sums of squares.
const LANES: usize = 16;

/// The stored weights of one module in the three models.
pub(super) struct Models<'a> {
    pub(super) name: &'a str,
    pub(super) finetuned: Stored<'a>,
    pub(super) aligned: Stored<'a>,
    pub(super) base: Stored<'a>,
}

/// Sums of squares over a module, in an order that does not depend on threads.
#[derive(Clone, Copy, Default)]
pub(super) struct Squares {
    pub(super) update: f64,
    pub(super) v: f64,
    pub(super) result: f64,
    pub(super) overflow: Option<Overflow>,
}

impl Models<'_> {
    pub(super) fn shape_error(&self, source: ShapeError) -> ProjectionError {
        ProjectionError::Shape { module: self.name.to_owned(), source }
    }

    /// Δ as an operand of the kernels.
    pub(super) fn update(&self, transposed: bool) -> Result<Stacked<'_>, ShapeError> {
        let pairs = self.finetuned.views.iter().zip(&self.aligned.views);
        let parts: Result<_, _> =
            pairs.map(|(ours, theirs)| Difference::new(ours.matrix()?, theirs.matrix()?)).collect();
        Ok(Stacked::new(parts?, transposed))
    }

    /// Writes aligned + blend. The base is read where the blend needs V, or to sum its squares.
    pub(super) fn blend(
        &self,
        engine: &mut Engine,
        blend: &Blend,
        sums_v: bool,
        output: &mut [u8],
        interrupted: &dyn Fn() -> bool,
    ) -> Result<Squares, ProjectionError> {
        let (rows, cols) = self.aligned.stored_shape();
        let rank = blend.right.len() / cols;
        let size = self.finetuned.views[0].dtype().size();
        let tile = (TILE_BYTES / (4 * cols)).clamp(ROWS, 1024).next_multiple_of(ROWS);
        let (bytes, zeros) = (as_bytes(&blend.right), vec![0; 2 * blend.right.len()]);
        let (mut weights, mut product) = (Vec::new(), Vec::new());
        let with_base = sums_v || blend.v != 0.0;
        let mut total = Squares::default();
        for start in (0..rows).step_by(tile) {
            if interrupted() {
                return Err(ProjectionError::Cancelled);
            }
            let count = tile.min(rows - start);
            if rank > 0 {
                weights.clear();
                let columns = (start..start + count).flat_map(|row| blend.left[row..].iter().step_by(rows));
                weights.extend(columns.copied());
                product.clear();
                product.resize(count * cols, 0.0);
                let right = Matrix::new(&bytes, Dtype::F32, rank, cols, cols);
                let zeros = Matrix::new(&zeros, Dtype::Bf16, rank, cols, cols);
                right
                    .and_then(|right| Difference::new(right, zeros?))
                    .and_then(|right| engine.transposed_product(&right, &weights, count, &mut product))
                    .map_err(|source| self.shape_error(source))?;
            }
            let product = &product;
            let slots = output[start * cols * size..(start + count) * cols * size].par_chunks_mut(ROWS * cols * size);
            let found: Vec<Squares> = engine.install(|| {
                let chunks = slots.enumerate().map(|(index, chunk)| {
                    let mut sums = Squares::default();
                    for (offset, slot) in chunk.chunks_exact_mut(cols * size).enumerate() {
                        let at = index * ROWS + offset;
                        let row = start + at;
                        let base = if with_base { self.base.row(row) } else { (&[][..], Dtype::F32) };
                        let product = product.get(at * cols..(at + 1) * cols).unwrap_or_default();
                        let models = (self.finetuned.row(row), self.aligned.row(row), base);
                        let (squares, overflow) = blend_row(models, (blend.update, blend.v), product, slot);
                        sums.add(squares, overflow.map(|(col, value)| Overflow { row, col, value }));
                    }
                    sums
                });
                chunks.collect()
            });
            for Squares { update, v, result, overflow } in found {
                total.add([update, v, result], overflow);
            }
        }
        Ok(total)
    }
}

impl Squares {
    fn add(&mut self, [update, v, result]: [f64; 3], overflow: Option<Overflow>) {
        self.update += update;
        self.v += v;
        self.result += result;
        self.overflow = self.overflow.or(overflow);
    }
}

/// A stored row: its bytes and dtype.
type Row<'a> = (&'a [u8], Dtype);
/// Squares of Δ, V and the result, and the first column that overflows with its value.
type RowResult = ([f64; 3], Option<(usize, f64)>);

multiversion!(
    blend_row,
    blend_row_body,
    (models: (Row<'_>, Row<'_>, Row<'_>), factors: (f32, f32), product: &[f32], slot: &mut [u8]) -> RowResult
);

/// One stored row of aligned + a·Δ + b·V + product. V is zero without base, and an empty product is zero.
///
/// Each step is a loop of its own over values in L1, which the compiler turns into vector instructions.
#[allow(clippy::inline_always, reason = "the body takes the features of the function it is inlined in")]
#[inline(always)]
fn blend_row_body(
    (finetuned, aligned, base): (Row<'_>, Row<'_>, Row<'_>),
    (a, b): (f32, f32),
    product: &[f32],
    slot: &mut [u8],
) -> RowResult {
    let dtype = finetuned.1;
    let cols = slot.len() / dtype.size();
    let mut squares = [[0.0; LANES]; 3];
    let mut overflow = None;
    let [mut update, mut weight, mut v, mut result] = [[0.0_f32; CHUNK]; 4];
    for start in (0..cols).step_by(CHUNK) {
        let width = CHUNK.min(cols - start);
        let padded = width.next_multiple_of(LANES);
        for values in [&mut update, &mut weight, &mut v, &mut result] {
            values[width..padded].fill(0.0);
        }
        load(finetuned, start, &mut update[..width]);
        load(aligned, start, &mut weight[..width]);
        for (update, weight) in update[..padded].iter_mut().zip(&weight) {
            *update -= weight;
        }
        add_squares(&update[..padded], &mut squares[0]);
        if !base.0.is_empty() {
            load(base, start, &mut v[..width]);
            for (v, weight) in v[..padded].iter_mut().zip(&weight) {
                *v = weight - *v;
            }
            add_squares(&v[..padded], &mut squares[1]);
        }
        for ((result, update), v) in result[..padded].iter_mut().zip(&update).zip(&v) {
            *result = a * update + b * v;
        }
        if !product.is_empty() {
            for (result, product) in result.iter_mut().zip(&product[start..start + width]) {
                *result += product;
            }
        }
        add_squares(&result[..padded], &mut squares[2]);
        for (weight, result) in weight[..padded].iter_mut().zip(&result) {
            *weight += result;
        }
        let slot = &mut slot[start * dtype.size()..(start + width) * dtype.size()];
        let found = round_row(&weight[..width], dtype, slot);
        overflow = overflow.or(found.map(|col| (start + col, f64::from(weight[col]))));
    }
    (squares.map(|lanes| lanes.iter().sum()), overflow)
}

#[allow(clippy::inline_always, clippy::needless_range_loop, reason = "as above; iterators are vectorized worse")]
#[inline(always)]
fn add_squares(values: &[f32], sums: &mut [f64; LANES]) {
    for values in values.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            let value = f64::from(values[lane]);
            sums[lane] += value * value;
        }
    }
}

/// Converts elements of a row from `start` on.
#[allow(clippy::inline_always, reason = "as above")]
#[inline(always)]
fn load((bytes, dtype): Row<'_>, start: usize, values: &mut [f32]) {
    let bytes = &bytes[start * dtype.size()..(start + values.len()) * dtype.size()];
    match dtype {
        Dtype::F32 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::Bf16 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        Dtype::F16 => {
            let mut halves = [half::f16::ZERO; CHUNK];
            for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks().0) {
                *half = half::f16::from_le_bytes(*bytes);
            }
            half::slice::HalfFloatSliceExt::convert_to_f32_slice(&halves[..values.len()], values);
        }
    }
}
