//! The projection of a full update: Δ = finetuned − aligned of one module, with B = Δ and A = 1.
//!
//! Every metric is a sum over columns of Δ, so Δ is read in tiles of columns and never held whole. C·Δ = V·(Vᵀ·Δ) takes
//! 4·m·n·n operations. Where m < n it is (V·Vᵀ)·Δ, with the m×m product formed once: 4·m·m·n.

use std::ops::Range;

use rayon::prelude::*;

use super::apply::leading;
use super::factors::{Walk, append};
use super::projector::{normalize, right_vectors};
use super::round::round_row;
use super::{Job, Leading, Operator, Overflow, Part, ProjectionError, Random, Stacked};
use crate::checkpoint::{CheckpointError, View};
use crate::kernels::{Difference, Dtype, Engine, Matrix, ShapeError};
use crate::linalg::combine;

/// Bytes of a tile and of its products.
const TILE_BYTES: usize = 96 << 20;
/// Most columns of a tile, and the columns that one thread loads at a time.
const TILE: usize = 512;
const CHUNK: usize = 16;
/// Stored rows that one thread writes.
const ROWS: usize = 16;

/// Result of projecting the full update of one module.
#[derive(Clone, Debug)]
pub struct UpdateOutcome {
    /// ‖V‖.
    pub v_norm: f64,
    /// Number of singular vectors that the operator uses, if any.
    pub rank: Option<usize>,
    /// Fraction of ‖V‖² in these vectors.
    pub energy: Option<f64>,
    /// Cosine of C·Δ and Δ; NaN if it was not asked for, or V or Δ is zero.
    pub cosine: f64,
    /// ‖Δ‖.
    pub update_norm: f64,
    /// Norm of the update that replaces Δ, before rounding.
    pub update_norm_projected: f64,
    /// The first element that is out of the dtype's range, by stored row and column.
    pub overflow: Option<Overflow>,
}

/// Writes aligned + O·Δ to `output`, row-major as stored, in the dtype of `finetuned`.
///
/// `finetuned` has one view for each part of the job. Without `cosine`, operators other than C skip the products with V.
/// `interrupted` is asked after each tile.
///
/// # Errors
/// If a weight is not finite, products leave the range of f32, or the run is interrupted.
///
/// # Panics
/// If the views do not fit the parts of the job, or `output` does not fit the views.
pub fn project_update(
    engine: &mut Engine,
    job: &Job,
    finetuned: &[View],
    operator: Operator,
    cosine: bool,
    output: &mut [u8],
    interrupted: &dyn Fn() -> bool,
) -> Result<UpdateOutcome, ProjectionError> {
    let shape = |source: ShapeError| ProjectionError::Shape { module: job.name().to_owned(), source };
    let out_of_range = || ProjectionError::OutOfRange(job.name().to_owned());
    let parts: Result<Vec<_>, _> = job.parts().iter().map(Part::difference).collect();
    let mut v = Stacked::new(parts.map_err(shape)?, job.is_transposed());
    let (m, n) = job.shape();
    let v_norm = norm(engine, &mut v).map_err(shape)?;
    let [aligned, base] = [Part::aligned, Part::base].map(|of| Stored::new(job.parts().iter().map(of), job));
    let finetuned = Stored::new(finetuned.iter(), job);

    let vectors = match operator.extent().filter(|_| v_norm > 0.0) {
        Some(extent) => leading(engine, &mut v, extent.within((m, n)), Random::new(0, job.name()))
            .map_err(|failure| failure.of(job.name()))?,
        None => Leading::default(),
    };
    let is_c = matches!(operator, Operator::Frobenius | Operator::Spectral);
    let mut by_c = None;
    if v_norm > 0.0 && (cosine || is_c) {
        by_c = Some(if m < n { Left::once(engine, &mut v, job).map_err(shape)? } else { Left::Twice });
    }
    let basis = as_bytes(&vectors.vectors);
    let zeros = vec![0; vectors.vectors.len() * 2];
    let mut basis = stacked(&basis, &zeros, (vectors.values.len(), m), true).map_err(shape)?;
    let right = if operator.changes_lora_a() && v_norm > 0.0 {
        let mut update = Stacked::new(finetuned.differences(&aligned).map_err(shape)?, job.is_transposed());
        Some(Right::new(engine, &mut v, &mut update, &vectors).map_err(shape)?)
    } else {
        None
    };

    let width = (TILE_BYTES / (4 * (4 * m + n))).clamp(CHUNK, TILE);
    let mut sums = Sums::default();
    for start in (0..n).step_by(width) {
        if interrupted() {
            return Err(ProjectionError::Cancelled);
        }
        let columns = start..n.min(start + width);
        let count = columns.len();
        let mut update = finetuned.columns(engine, columns.clone())?;
        subtract(engine, &mut update, &aligned.columns(engine, columns.clone())?);
        let mut applied = None;
        if let Some(left) = &by_c {
            let (columns, scale) = left.apply(engine, &mut v, &update, count).map_err(shape)?;
            sums.add_cosine(engine, &update, &columns, m, scale);
            applied = Some((columns, scale));
        }
        let mut inside = |engine: &mut Engine, x: &[f32]| {
            twice(engine, &mut basis, x, count).map(|(mut columns, scale)| {
                for value in &mut columns {
                    *value = (f64::from(*value) * scale) as f32;
                }
                columns
            })
        };
        let (result, factor) = match operator {
            _ if v_norm == 0.0 => (update.clone(), 1.0),
            Operator::Zero => (vec![0.0; update.len()], 1.0),
            Operator::Frobenius | Operator::Spectral => {
                let (columns, scale) = applied.unwrap_or_default();
                let divisor = if operator == Operator::Frobenius { v_norm } else { vectors.largest().powi(2) };
                (columns, scale / divisor)
            }
            Operator::Orthogonal(_) => (inside(engine, &update).map_err(shape)?, 1.0),
            Operator::Attenuate { keep, .. } => {
                let mut outside = update.clone();
                if let Some(right) = &right {
                    mix(&mut outside, &right.inside(engine, columns.clone(), m), keep);
                }
                let projected = inside(engine, &outside).map_err(shape)?;
                mix(&mut outside, &projected, keep);
                (outside, 1.0)
            }
            Operator::Restore(weight) => {
                let mut v = aligned.columns(engine, columns.clone())?;
                subtract(engine, &mut v, &base.columns(engine, columns.clone())?);
                (added(&update, &v, weight), 1.0)
            }
            Operator::Extrapolate { weight, .. } => {
                let mut v = aligned.columns(engine, columns.clone())?;
                subtract(engine, &mut v, &base.columns(engine, columns.clone())?);
                (added(&update, &inside(engine, &v).map_err(shape)?, weight), 1.0)
            }
        };
        sums.add_norms(engine, &update, &result, m, factor);
        let overflow = aligned.write(engine, &result, factor, columns, finetuned.views[0].dtype(), output);
        sums.overflow = sums.overflow.or(overflow);
    }
    for view in [&finetuned, &aligned, &base].iter().flat_map(|stored| &stored.views) {
        view.pages().give_back();
    }
    if !(v_norm.is_finite() && sums.projected.is_finite() && sums.update.is_finite() && !sums.applied.is_infinite()) {
        return Err(out_of_range());
    }
    let uses_vectors = operator.uses_vectors();
    Ok(UpdateOutcome {
        v_norm,
        rank: uses_vectors.then_some(vectors.values.len()),
        energy: (uses_vectors && v_norm > 0.0).then(|| (vectors.energy() / v_norm.powi(2)).min(1.0)),
        cosine: (sums.inner.max(0.0) / (sums.applied.sqrt() * sums.update.sqrt())).clamp(-1.0, 1.0),
        update_norm: sums.update.sqrt(),
        update_norm_projected: sums.projected.sqrt(),
        overflow: sums.overflow,
    })
}

/// ‖V‖, from one read of V.
fn norm(engine: &mut Engine, v: &mut Stacked<'_>) -> Result<f64, ShapeError> {
    if v.is_transposed() {
        v.product(engine, &[], 0, &mut [])?;
    } else {
        v.transposed_product(engine, &[], 0, &mut [])?;
    }
    Ok(v.norm_squared().unwrap_or(f64::NAN).sqrt())
}

/// F·(Fᵀ·x) divided by a power of two, and that power.
fn twice(engine: &mut Engine, f: &mut Stacked<'_>, x: &[f32], count: usize) -> Result<(Vec<f32>, f64), ShapeError> {
    let (m, n) = f.shape();
    let mut reduced = vec![0.0; count * n];
    f.transposed_product(engine, x, count, &mut reduced)?;
    let scale = normalize(&mut reduced);
    let mut columns = vec![0.0; count * m];
    f.product(engine, &reduced, count, &mut columns)?;
    Ok((columns, scale))
}

/// How C·Δ is computed, without the division by ‖V‖.
enum Left {
    /// V·(Vᵀ·Δ).
    Twice,
    /// (V·Vᵀ)·Δ, with the product (m, m) as bytes of f32, zeros to subtract, and a power of two.
    Once(Vec<u8>, Vec<u8>, f64),
}

impl Left {
    fn once(engine: &mut Engine, v: &mut Stacked<'_>, job: &Job) -> Result<Self, ShapeError> {
        let (m, n) = job.shape();
        let mut square = vec![0.0; m * m];
        // The rows of V are images of unit vectors, exactly.
        let width = (TILE_BYTES / (4 * (2 * m + n))).clamp(CHUNK, TILE);
        for start in (0..m).step_by(width) {
            let count = width.min(m - start);
            let mut units = vec![0.0; count * m];
            for index in 0..count {
                units[index * m + start + index] = 1.0;
            }
            let mut rows = vec![0.0; count * n];
            v.transposed_product(engine, &units, count, &mut rows)?;
            v.product(engine, &rows, count, &mut square[start * m..(start + count) * m])?;
        }
        let scale = normalize(&mut square);
        Ok(Self::Once(as_bytes(&square), vec![0; 2 * m * m], scale))
    }

    fn apply(
        &self,
        engine: &mut Engine,
        v: &mut Stacked<'_>,
        x: &[f32],
        count: usize,
    ) -> Result<(Vec<f32>, f64), ShapeError> {
        let m = v.shape().0;
        match self {
            Self::Twice => twice(engine, v, x, count),
            Self::Once(square, zeros, scale) => {
                let mut columns = vec![0.0; count * m];
                stacked(square, zeros, (m, m), false)?.product(engine, x, count, &mut columns)?;
                Ok((columns, *scale))
            }
        }
    }
}

/// What multiplies Δ by W·Wᵀ, with the right singular vectors W (k, n) and Δ·W (k, m).
struct Right {
    vectors: Vec<f32>,
    images: Vec<f32>,
}

impl Right {
    fn new(
        engine: &mut Engine,
        v: &mut Stacked<'_>,
        update: &mut Stacked<'_>,
        leading: &Leading,
    ) -> Result<Self, ShapeError> {
        let (m, n) = v.shape();
        let vectors = right_vectors(engine, v, leading)?;
        let mut images = vec![0.0; vectors.len() / n * m];
        update.product(engine, &vectors, vectors.len() / n, &mut images)?;
        Ok(Self { vectors, images })
    }

    /// Columns of Δ·W·Wᵀ.
    fn inside(&self, engine: &Engine, columns: Range<usize>, m: usize) -> Vec<f32> {
        let rank = self.images.len() / m;
        let n = self.vectors.len() / rank.max(1);
        let weights: Vec<f64> =
            (0..rank).flat_map(|k| self.vectors[k * n..][columns.clone()].iter().copied().map(f64::from)).collect();
        engine.install(|| combine(&self.images, m, &weights, columns.len()))
    }
}

/// A stored matrix as slices of rows; it is W (m, n) or, if transposed, Wᵀ.
struct Stored<'a> {
    views: Vec<&'a View>,
    transposed: bool,
    rows: usize,
}

impl<'a> Stored<'a> {
    fn new(views: impl Iterator<Item = &'a View>, job: &Job) -> Self {
        Self { views: views.collect(), transposed: job.is_transposed(), rows: job.shape().0 }
    }

    fn differences(&self, other: &Self) -> Result<Vec<Difference<'a>>, ShapeError> {
        let pairs = self.views.iter().zip(&other.views);
        pairs.map(|(ours, theirs)| Difference::new(ours.matrix()?, theirs.matrix()?)).collect()
    }

    /// Columns of W, each contiguous.
    fn columns(&self, engine: &Engine, columns: Range<usize>) -> Result<Vec<f32>, CheckpointError> {
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
    fn write(
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

/// Sums over the columns of a module.
#[derive(Default)]
struct Sums {
    update: f64,
    projected: f64,
    inner: f64,
    applied: f64,
    overflow: Option<Overflow>,
}

impl Sums {
    fn add_cosine(&mut self, engine: &Engine, update: &[f32], applied: &[f32], m: usize, scale: f64) {
        let (inner, _, applied) = dots(engine, update, applied, m);
        self.inner += inner * scale;
        self.applied += applied * scale * scale;
    }

    fn add_norms(&mut self, engine: &Engine, update: &[f32], result: &[f32], m: usize, factor: f64) {
        let (_, update, projected) = dots(engine, update, result, m);
        self.update += update;
        self.projected += projected * factor * factor;
    }
}

/// ⟨x, y⟩, ‖x‖² and ‖y‖², in an order that does not depend on threads.
fn dots(engine: &Engine, x: &[f32], y: &[f32], m: usize) -> (f64, f64, f64) {
    let sums: Vec<[f64; 3]> = engine.install(|| {
        let pairs = x.par_chunks(m).zip(y.par_chunks(m));
        pairs
            .map(|(x, y)| {
                let mut lanes = [[0.0; 3]; 8];
                for (x, y) in x.chunks(8).zip(y.chunks(8)) {
                    for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
                        let (x, y) = (f64::from(*x), f64::from(*y));
                        *lane = [lane[0] + x * y, lane[1] + x * x, lane[2] + y * y];
                    }
                }
                lanes.into_iter().fold([0.0; 3], |sum, lane| std::array::from_fn(|index| sum[index] + lane[index]))
            })
            .collect()
    });
    sums.iter().fold((0.0, 0.0, 0.0), |sum, [xy, xx, yy]| (sum.0 + xy, sum.1 + xx, sum.2 + yy))
}

fn subtract(engine: &Engine, x: &mut [f32], y: &[f32]) {
    engine.install(|| x.par_iter_mut().zip(y).with_min_len(1 << 14).for_each(|(x, y)| *x -= y));
}

/// keep·x + (1 − keep)·inside, in place.
fn mix(x: &mut [f32], inside: &[f32], keep: f64) {
    for (x, inside) in x.iter_mut().zip(inside) {
        *x = (keep * f64::from(*x) + (1.0 - keep) * f64::from(*inside)) as f32;
    }
}

/// x + weight·y.
fn added(x: &[f32], y: &[f32], weight: f64) -> Vec<f32> {
    x.iter().zip(y).map(|(x, y)| (f64::from(*x) + weight * f64::from(*y)) as f32).collect()
}

fn as_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A matrix of f32 as the only slice of V; `zeros` are as many bfloat16.
fn stacked<'a>(
    values: &'a [u8],
    zeros: &'a [u8],
    (rows, cols): (usize, usize),
    transposed: bool,
) -> Result<Stacked<'a>, ShapeError> {
    let values = Matrix::new(values, Dtype::F32, rows, cols, cols)?;
    let zeros = Matrix::new(zeros, Dtype::Bf16, rows, cols, cols)?;
    Ok(Stacked::new(vec![Difference::new(values, zeros)?], transposed))
}
