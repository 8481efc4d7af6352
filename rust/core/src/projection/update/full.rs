//! C·Δ of a full update, and its cosine with Δ.
//!
//! Every metric is a sum over columns of Δ, so Δ is read in tiles of columns and never held whole. V·(Vᵀ·Δ) takes
//! 4·m·n·n operations. Where m < n it is (V·Vᵀ)·Δ, with the m×m product formed once: 4·m·m·n.

use std::ops::Range;

use rayon::prelude::*;

use super::as_bytes;
use super::rows::Models;
use crate::kernels::{Difference, Dtype, Engine, Matrix, ShapeError};
use crate::projection::projector::normalize;
use crate::projection::{Overflow, ProjectionError, Stacked};

/// Bytes of a tile and of its products.
const TILE_BYTES: usize = 96 << 20;
/// Least and most columns of a tile.
const LEAST: usize = 16;
const MOST: usize = 512;

/// Sums over the columns of a module.
#[derive(Default)]
pub(super) struct Sums {
    /// ‖Δ‖².
    pub(super) update: f64,
    /// ‖O·Δ‖².
    pub(super) projected: f64,
    /// ⟨V·VᵀΔ, Δ⟩.
    pub(super) inner: f64,
    /// ‖V·VᵀΔ‖².
    pub(super) applied: f64,
    /// The first element that is out of range.
    pub(super) overflow: Option<Overflow>,
}

/// Sums over V·VᵀΔ and Δ; with a `divisor`, also writes aligned + V·VᵀΔ/divisor.
pub(super) fn apply(
    engine: &mut Engine,
    v: &mut Stacked<'_>,
    models: &Models<'_>,
    divisor: Option<f64>,
    output: &mut [u8],
    interrupted: &dyn Fn() -> bool,
) -> Result<Sums, ProjectionError> {
    let Models { finetuned, aligned, .. } = models;
    let (m, n) = v.shape();
    let square = if m < n { Some(Square::new(engine, v, models, interrupted)?) } else { None };
    let mut sums = Sums::default();
    for columns in tiles(n, 4 * m + n) {
        if interrupted() {
            return Err(ProjectionError::Cancelled);
        }
        let count = columns.len();
        let mut update = finetuned.columns(engine, columns.clone())?;
        subtract(engine, &mut update, &aligned.columns(engine, columns.clone())?);
        let mut applied = vec![0.0; count * m];
        let scale = if let Some(square) = &square {
            square.apply(engine, &update, count, &mut applied).map_err(|source| models.shape_error(source))?;
            square.scale
        } else {
            let mut reduced = vec![0.0; count * n];
            v.transposed_product(engine, &update, count, &mut reduced).map_err(|source| models.shape_error(source))?;
            let scale = normalize(&mut reduced);
            v.product(engine, &reduced, count, &mut applied).map_err(|source| models.shape_error(source))?;
            scale
        };
        let [inner, update, squares] = dots(engine, &update, &applied, m);
        sums.update += update;
        sums.inner += inner * scale;
        sums.applied += squares * scale * scale;
        if let Some(divisor) = divisor {
            let factor = scale / divisor;
            sums.projected += squares * factor * factor;
            let overflow = aligned.write(engine, &applied, factor, columns, finetuned.views[0].dtype(), output);
            sums.overflow = sums.overflow.or(overflow);
        }
    }
    Ok(sums)
}

/// Reads V once, which leaves ‖V‖² behind.
pub(super) fn read(engine: &mut Engine, v: &mut Stacked<'_>, models: &Models<'_>) -> Result<(), ProjectionError> {
    let read = if v.is_transposed() {
        v.product(engine, &[], 0, &mut [])
    } else {
        v.transposed_product(engine, &[], 0, &mut [])
    };
    read.map_err(|source| models.shape_error(source))
}

/// V·Vᵀ (m, m) as bytes of f32, zeros to subtract, and the power of two that it was divided by.
struct Square {
    bytes: Vec<u8>,
    zeros: Vec<u8>,
    scale: f64,
}

impl Square {
    fn new(
        engine: &mut Engine,
        v: &mut Stacked<'_>,
        models: &Models<'_>,
        interrupted: &dyn Fn() -> bool,
    ) -> Result<Self, ProjectionError> {
        let (m, n) = v.shape();
        let [aligned, base] = [&models.aligned, &models.base].map(|stored| stored.turned(n));
        let mut square = vec![0.0; m * m];
        for rows in tiles(m, 2 * m + 2 * n) {
            if interrupted() {
                return Err(ProjectionError::Cancelled);
            }
            let mut values = aligned.columns(engine, rows.clone())?;
            subtract(engine, &mut values, &base.columns(engine, rows.clone())?);
            v.product(engine, &values, rows.len(), &mut square[rows.start * m..rows.end * m])
                .map_err(|source| models.shape_error(source))?;
        }
        let scale = normalize(&mut square);
        Ok(Self { bytes: as_bytes(&square), zeros: vec![0; 2 * m * m], scale })
    }

    fn apply(&self, engine: &mut Engine, x: &[f32], count: usize, y: &mut [f32]) -> Result<(), ShapeError> {
        let m = x.len() / count;
        let square = Matrix::new(&self.bytes, Dtype::F32, m, m, m)?;
        let zeros = Matrix::new(&self.zeros, Dtype::Bf16, m, m, m)?;
        engine.product(&Difference::new(square, zeros)?, x, count, y)
    }
}

/// Ranges of `count` columns for which `values` f32 values each are held.
fn tiles(count: usize, values: usize) -> impl Iterator<Item = Range<usize>> {
    let width = (TILE_BYTES / (4 * values)).clamp(LEAST, MOST);
    (0..count).step_by(width).map(move |start| start..count.min(start + width))
}

/// ⟨x, y⟩, ‖x‖² and ‖y‖², in an order that does not depend on threads.
fn dots(engine: &Engine, x: &[f32], y: &[f32], m: usize) -> [f64; 3] {
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
    sums.iter().fold([0.0; 3], |total, sum| std::array::from_fn(|index| total[index] + sum[index]))
}

fn subtract(engine: &Engine, x: &mut [f32], y: &[f32]) {
    engine.install(|| x.par_iter_mut().zip(y).with_min_len(1 << 14).for_each(|(x, y)| *x -= y));
}
