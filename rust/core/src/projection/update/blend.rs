//! The result of an operator other than C, as a·Δ + b·V + LᵀR.

use super::rows::Models;
use crate::kernels::{Engine, ShapeError};
use crate::linalg::{combine, inner_products};
use crate::projection::projector::right_vectors;
use crate::projection::{Leading, Operator, Stacked};

/// a·Δ + b·V + LᵀR, oriented like the stored matrices: L (K, stored rows) and R (K, stored columns).
#[derive(Debug, PartialEq)]
pub(super) struct Blend {
    /// a.
    pub(super) update: f32,
    /// b.
    pub(super) v: f32,
    /// L.
    pub(super) left: Vec<f32>,
    /// R.
    pub(super) right: Vec<f32>,
}

impl Blend {
    /// Δ itself.
    pub(super) const UNCHANGED: Self = Self::plain(1.0, 0.0);

    const fn plain(update: f32, v: f32) -> Self {
        Self { update, v, left: Vec::new(), right: Vec::new() }
    }

    /// The result of `operator` with the leading singular vectors that it uses; Δ itself if there are none of them.
    pub(super) fn of(
        operator: Operator,
        engine: &mut Engine,
        v: &mut Stacked<'_>,
        models: &Models<'_>,
        leading: &Leading,
    ) -> Result<Self, ShapeError> {
        let basis = &leading.vectors;
        if operator.uses_vectors() && basis.is_empty() {
            return Ok(Self::UNCHANGED);
        }
        let (m, n) = v.shape();
        let rank = basis.len() / m;
        let inside = |engine: &mut Engine, of: &mut Stacked<'_>| {
            let mut reduced = vec![0.0; rank * n];
            of.transposed_product(engine, basis, rank, &mut reduced).map(|()| reduced)
        };
        let mut blend = match operator {
            Operator::Frobenius | Operator::Spectral => return Ok(Self::UNCHANGED),
            Operator::Zero => Self::plain(0.0, 0.0),
            Operator::Restore(weight) => Self::plain(1.0, weight as f32),
            Operator::Orthogonal(_) => {
                let right = inside(engine, &mut models.update(v.is_transposed())?)?;
                Self { left: basis.clone(), right, ..Self::plain(0.0, 0.0) }
            }
            Operator::Extrapolate { weight, .. } => {
                let right = scaled(inside(engine, v)?, weight);
                Self { left: basis.clone(), right, ..Self::plain(1.0, 0.0) }
            }
            Operator::Attenuate { keep, both, .. } => {
                let mut update = models.update(v.is_transposed())?;
                let mut reduced = inside(engine, &mut update)?;
                let (mut left, mut right) = (basis.clone(), Vec::new());
                if both {
                    // Δ′ = keep·Δ + (1 − keep)·Δ·W·Wᵀ replaces Δ.
                    let outer = right_vectors(engine, v, leading)?;
                    let count = outer.len() / n;
                    let mut images = vec![0.0; count * m];
                    update.product(engine, &outer, count, &mut images)?;
                    // Uᵀ·Δ·W as (k, j), whose columns combine the rows of Wᵀ.
                    let across = engine.install(|| inner_products(&images, basis, m));
                    let along = engine.install(|| combine(&outer, n, &across, rank));
                    for (value, along) in reduced.iter_mut().zip(&along) {
                        *value = (keep * f64::from(*value) + (1.0 - keep) * f64::from(*along)) as f32;
                    }
                    left.extend_from_slice(&images);
                    right = scaled(outer, keep * (1.0 - keep));
                }
                let mut first = scaled(reduced, 1.0 - keep);
                first.append(&mut right);
                let update = if both { keep * keep } else { keep };
                Self { left, right: first, ..Self::plain(update as f32, 0.0) }
            }
        };
        if v.is_transposed() {
            std::mem::swap(&mut blend.left, &mut blend.right);
        }
        Ok(blend)
    }
}

fn scaled(mut values: Vec<f32>, factor: f64) -> Vec<f32> {
    for value in &mut values {
        *value = (f64::from(*value) * factor) as f32;
    }
    values
}
