//! C·B for one matrix in memory.

use std::sync::atomic::AtomicBool;

use super::projector::normalize;
use super::subspace::{Extent, Failure, Iteration, start_count};
use super::{Leading, ProjectionError, Random, Stacked};
use crate::kernels::Engine;
use crate::linalg::orthonormal;

/// The divisor of C·B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Normalization {
    /// ‖V‖, as in the paper.
    Frobenius,
    /// σ₁(V)², so that the largest gain is 1.
    Spectral,
}

/// V·Vᵀ·B before its final scaling.
#[derive(Debug)]
pub struct Applied {
    /// (r, m): columns of V·Vᵀ·B.
    pub columns: Vec<f32>,
    /// C·B = factor·columns; zero if V is zero.
    pub factor: f64,
    /// ‖V‖.
    pub v_norm: f64,
}

/// Multiplies B, stored as columns (r, m), by C.
///
/// # Errors
/// If V or B is not finite.
pub fn apply(
    engine: &mut Engine,
    v: &mut Stacked<'_>,
    lora_b: &[f32],
    normalization: Normalization,
) -> Result<Applied, ProjectionError> {
    const NAME: &str = "subspace_projection";
    let shape = |source| ProjectionError::Shape { module: NAME.to_owned(), source };
    let (m, n) = v.shape();
    let rank = lora_b.len() / m;
    let mut reduced = vec![0.0; rank * n];
    v.transposed_product(engine, lora_b, rank, &mut reduced).map_err(shape)?;
    let scale = normalize(&mut reduced);
    let mut columns = vec![0.0; rank * m];
    v.product(engine, &reduced, rank, &mut columns).map_err(shape)?;
    let v_norm = v.norm_squared().map_or(f64::NAN, f64::sqrt);
    if !v_norm.is_finite() || !columns.iter().all(|value| value.is_finite()) {
        return Err(ProjectionError::OutOfRange(NAME.to_owned()));
    }
    let divisor = match normalization {
        _ if v_norm == 0.0 => return Ok(Applied { columns, factor: 0.0, v_norm }),
        Normalization::Frobenius => v_norm,
        Normalization::Spectral => {
            let leading =
                leading(engine, v, Extent::Rank(1), Random::new(0, "")).map_err(|failure| failure.of(NAME))?;
            leading.values.first().map_or(0.0, |value| value.powi(2))
        }
    };
    Ok(Applied { columns, factor: scale / divisor, v_norm })
}

/// Leading singular vectors of V; none if V is zero or not finite.
pub(super) fn leading(
    engine: &mut Engine,
    v: &mut Stacked<'_>,
    extent: Extent,
    mut random: Random,
) -> Result<Leading, Failure> {
    let (m, n) = v.shape();
    let count = start_count(extent, (m, n));
    let mut start = Vec::new();
    random.extend(&mut start, count * m);
    let mut image = vec![0.0; count * n];
    v.transposed_product(engine, &start, count, &mut image)?;
    let right = engine.install(|| orthonormal(&image, &[], n));
    let mut left = vec![0.0; right.len() / n * m];
    v.product(engine, &right, right.len() / n, &mut left)?;
    // Known only now if the stored matrix is Vᵀ.
    if !v.norm_squared().is_some_and(|squared| squared > 0.0 && squared.is_finite()) {
        return Ok(Leading::default());
    }
    Iteration::new(v, engine, right, left, extent, random).run(&AtomicBool::new(false))
}
