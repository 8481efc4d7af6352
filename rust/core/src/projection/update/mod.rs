//! The projection of a full update: Δ = finetuned − aligned of one module, with B = Δ and A = 1.
//!
//! C·Δ is computed in tiles of columns (`full`). All other results are a·Δ + b·V + LᵀR with few rows in L and R
//! (`blend`), so each model is read row by row (`rows`).

mod blend;
mod columns;
mod full;
mod rows;

use self::blend::Blend;
use self::columns::Stored;
use self::rows::Models;
use super::apply::leading;
use super::factors::first_not_finite;
use super::projector::not_finite;
use super::{Job, Leading, Operator, Overflow, Part, ProjectionError, Random, Stacked};
use crate::checkpoint::View;
use crate::kernels::Engine;

/// Result of projecting the full update of one module.
#[derive(Clone, Debug)]
pub struct UpdateOutcome {
    /// ‖V‖; NaN if vectors were given, since V was not read.
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
/// `vectors` (k, m), orthonormal, replace the leading left singular vectors of V for [`Operator::Orthogonal`], whose
/// extent is ignored then. The base is not read. `interrupted` is asked after each tile.
///
/// # Errors
/// If a weight is not finite, products leave the range of f32, or the run is interrupted.
///
/// # Panics
/// If the views do not fit the parts of the job, `output` does not fit the views, or `vectors` are given for another
/// operator.
#[allow(clippy::too_many_arguments, reason = "one call per module, from the extension only")]
pub fn project_update(
    engine: &mut Engine,
    job: &Job,
    finetuned: &[View],
    operator: Operator,
    vectors: Option<Vec<f32>>,
    cosine: bool,
    output: &mut [u8],
    interrupted: &dyn Fn() -> bool,
) -> Result<UpdateOutcome, ProjectionError> {
    let [aligned, base] = [Part::aligned, Part::base].map(|of| Stored::new(job.parts().iter().map(of), job));
    let models = Models { name: job.name(), finetuned: Stored::new(finetuned.iter(), job), aligned, base };
    let shape = |source| models.shape_error(source);
    let parts: Result<Vec<_>, _> = job.parts().iter().map(Part::difference).collect();
    let mut v = Stacked::new(parts.map_err(shape)?, job.is_transposed());
    let given = vectors.is_some();
    assert!(!given || matches!(operator, Operator::Orthogonal(_)), "vectors for {operator:?}");

    let found = match (vectors, operator.extent()) {
        (Some(vectors), _) => Leading { values: vec![f64::NAN; vectors.len() / v.shape().0], vectors },
        (None, Some(extent)) => leading(engine, &mut v, extent.within(job.shape()), Random::new(0, job.name()))
            .map_err(|failure| failure.of(job.name()))?,
        (None, None) => Leading::default(),
    };
    let is_c = matches!(operator, Operator::Frobenius | Operator::Spectral);
    if (is_c || cosine) && v.norm_squared().is_none() {
        full::read(engine, &mut v, &models)?;
    }
    let mut sums = full::Sums::default();
    if (is_c || cosine) && v.norm_squared() > Some(0.0) {
        let divisor = match operator {
            Operator::Frobenius => v.norm_squared().map(f64::sqrt),
            Operator::Spectral => Some(found.largest().powi(2)),
            _ => None,
        };
        sums = full::apply(engine, &mut v, &models, divisor, output, interrupted)?;
    }
    let mut v_norm_squared = v.norm_squared();
    if !is_c || v_norm_squared == Some(0.0) {
        let blend = Blend::of(operator, engine, &mut v, &models, &found).map_err(shape)?;
        let sums_v = !given && v_norm_squared.is_none();
        let mut squares = models.blend(engine, &blend, sums_v, output, interrupted)?;
        v_norm_squared = v_norm_squared.or(sums_v.then_some(squares.v));
        if v_norm_squared == Some(0.0) && blend != Blend::UNCHANGED {
            squares = models.blend(engine, &Blend::UNCHANGED, false, output, interrupted)?;
        }
        (sums.update, sums.projected, sums.overflow) = (squares.update, squares.result, squares.overflow);
    }
    for view in [&models.finetuned, &models.aligned, &models.base].iter().flat_map(|stored| &stored.views) {
        view.pages().give_back();
    }
    let v_norm = v_norm_squared.map_or(f64::NAN, f64::sqrt);
    if !((given || v_norm.is_finite())
        && sums.projected.is_finite()
        && sums.update.is_finite()
        && !sums.applied.is_infinite())
    {
        return Err(finetuned.iter().find_map(first_not_finite).map_or_else(|| not_finite(job), Into::into));
    }
    let uses_vectors = operator.uses_vectors();
    Ok(UpdateOutcome {
        v_norm,
        rank: uses_vectors.then_some(found.values.len()),
        energy: (uses_vectors && v_norm > 0.0).then(|| (found.energy() / v_norm.powi(2)).min(1.0)),
        cosine: (sums.inner.max(0.0) / (sums.applied.sqrt() * sums.update.sqrt())).clamp(-1.0, 1.0),
        update_norm: sums.update.sqrt(),
        update_norm_projected: sums.projected.sqrt(),
        overflow: sums.overflow,
    })
}

fn as_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
