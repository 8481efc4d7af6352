//! The projection of one module.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::AtomicBool;

use super::factors::{append_columns, append_rows, first_not_finite};
use super::outcome::{Grams, diagonal};
use super::subspace::{Iteration, start_count};
use super::{
    FactorOutcome, Factors, Job, JobOutcome, Leading, Operator, ProjectionError, Random, Settings, Stacked,
    write_rounded,
};
use crate::kernels::{Engine, ShapeError};
use crate::linalg::{combine, gram, inner_products, orthonormal};

/// Projects modules one after another with the same threads and buffers.
#[derive(Debug)]
pub struct Projector {
    engine: Engine,
    settings: Settings,
    /// B of every adapter, (R, m).
    left: Vec<f32>,
    /// A of one adapter, (r, n).
    right: Vec<f32>,
    /// T = VᵀB, (R, n), each adapter's scaled by a power of two.
    reduced: Vec<f32>,
    /// S = V·T, (R, m).
    applied: Vec<f32>,
}

/// O·B = factor·columns, and the Gram matrix of the columns.
struct Projected<'a> {
    /// (r, m).
    columns: Cow<'a, [f32]>,
    factor: f64,
    gram: Vec<f64>,
}

/// One adapter's share of the stacked columns.
struct Share<'a> {
    factors: &'a Factors,
    columns: Range<usize>,
    grams: Grams,
    /// T was divided by this power of two.
    scale: f64,
}

impl Projector {
    /// A projector on the threads of `engine`.
    #[must_use]
    pub const fn new(engine: Engine, settings: Settings) -> Self {
        Self { engine, settings, left: Vec::new(), right: Vec::new(), reduced: Vec::new(), applied: Vec::new() }
    }

    /// Projects every adapter's factors of one module.
    ///
    /// # Errors
    /// When a weight or factor is not finite, products leave the range of f32, or `cancel` is set meanwhile.
    pub fn run(&mut self, job: &Job, cancel: &AtomicBool) -> Result<JobOutcome, ProjectionError> {
        let shape = |source: ShapeError| ProjectionError::Shape { module: job.name().to_owned(), source };
        let parts: Result<Vec<_>, _> = job.parts().iter().map(super::Part::difference).collect();
        let mut v = Stacked::new(parts.map_err(shape)?, job.is_transposed());
        let mut shares = self.load(job)?;
        let (m, n) = job.shape();
        let rank = self.left.len() / m;

        let extent = self.settings.operator.extent((m, n));
        let mut random = Random::new(self.settings.seed, job.name());
        let started = extent.map_or(0, |extent| start_count(extent, (m, n)));
        random.extend(&mut self.left, started * m);

        ProjectionError::if_cancelled(cancel)?;
        self.reduced.resize((rank + started) * n, 0.0);
        v.transposed_product(&mut self.engine, &self.left, rank + started, &mut self.reduced).map_err(shape)?;
        for share in &mut shares {
            share.scale = normalise(&mut self.reduced[share.columns.start * n..share.columns.end * n]);
        }
        let right = self.engine.install(|| orthonormal(&self.reduced[rank * n..], &[], n));
        self.reduced.truncate(rank * n);
        self.reduced.extend_from_slice(&right);
        ProjectionError::if_cancelled(cancel)?;
        let columns = rank + right.len() / n;
        self.applied.resize(columns * m, 0.0);
        v.product(&mut self.engine, &self.reduced, columns, &mut self.applied).map_err(shape)?;
        ProjectionError::if_cancelled(cancel)?;

        let norm_squared = v.norm_squared().unwrap_or(f64::NAN);
        if !norm_squared.is_finite() {
            return Err(not_finite(job));
        }
        let v_norm = norm_squared.sqrt();
        let leading = match extent {
            Some(extent) if v_norm > 0.0 => {
                let left = self.applied[rank * m..].to_vec();
                let iteration = Iteration::new(&mut v, &mut self.engine, right, left, extent, random);
                Some(iteration.run(cancel).map_err(|failure| failure.of(job.name()))?)
            }
            Some(_) => Some(Leading::default()),
            None => None,
        };
        let mut factors = Vec::with_capacity(shares.len());
        for share in shares {
            let outcome = if v_norm > 0.0 {
                self.project(job, &share, v_norm, leading.as_ref())?
            } else {
                self.unchanged(&share)
            };
            factors.push(outcome);
        }
        let spectral_norm = leading.as_ref().map(|leading| leading.values.first().copied().unwrap_or(0.0));
        let leading = leading.filter(|_| self.settings.operator.is_orthogonal());
        let energy = leading.as_ref().filter(|_| v_norm > 0.0).map(|leading| leading.energy() / norm_squared);
        let energy = energy.map(|energy| energy.min(1.0));
        let rank = leading.as_ref().map(|leading| leading.values.len());
        let leading = leading.filter(|_| self.settings.keep_subspace);
        Ok(JobOutcome { v_norm, rank, energy, spectral_norm, leading, factors })
    }

    /// Reads the factors of every adapter.
    fn load<'a>(&mut self, job: &'a Job) -> Result<Vec<Share<'a>>, ProjectionError> {
        let (m, n) = job.shape();
        self.left.clear();
        let mut shares = Vec::with_capacity(job.factors().len());
        for factors in job.factors() {
            let start = self.left.len();
            append_columns(factors.left(), &mut self.left)?;
            self.right.clear();
            append_rows(factors.right(), &mut self.right)?;
            let (left, right) = (&self.left[start..], &self.right);
            let grams = self.engine.install(|| Grams { left: gram(left, m), right: gram(right, n) });
            shares.push(Share { factors, columns: start / m..self.left.len() / m, grams, scale: 1.0 });
        }
        Ok(shares)
    }

    /// The figures of one adapter and its projected left factor.
    fn project(
        &self,
        job: &Job,
        share: &Share<'_>,
        v_norm: f64,
        leading: Option<&Leading>,
    ) -> Result<FactorOutcome, ProjectionError> {
        let (m, n) = job.shape();
        let Range { start, end } = share.columns;
        let rank = end - start;
        let (reduced, applied) = (&self.reduced[start * n..end * n], &self.applied[start * m..end * m]);
        let (reduced_gram, applied_gram) = self.engine.install(|| (gram(reduced, n), gram(applied, m)));
        if !(diagonal(&reduced_gram, rank).is_finite() && diagonal(&applied_gram, rank).is_finite()) {
            return Err(ProjectionError::OutOfRange(job.name().to_owned()));
        }
        let spectral_norm = leading.and_then(|leading| leading.values.first().copied()).unwrap_or(f64::NAN);
        let projected = match (self.settings.operator, leading) {
            (Operator::Zero, _) => {
                Projected { columns: Cow::Borrowed(applied), factor: 0.0, gram: applied_gram.clone() }
            }
            (Operator::OrthogonalRank(_) | Operator::OrthogonalEnergy(_), Some(leading)) => {
                self.engine.install(|| orthogonal(leading, &self.left[start * m..end * m], m))
            }
            (Operator::Spectral, _) => {
                let factor = share.scale / (spectral_norm * spectral_norm);
                Projected { columns: Cow::Borrowed(applied), factor, gram: applied_gram.clone() }
            }
            _ => {
                let factor = share.scale / v_norm;
                Projected { columns: Cow::Borrowed(applied), factor, gram: applied_gram.clone() }
            }
        };
        Ok(self.outcome(share, &projected, share.grams.cosine(&reduced_gram, &applied_gram, share.scale)))
    }

    fn outcome(&self, share: &Share<'_>, projected: &Projected<'_>, cosine: f64) -> FactorOutcome {
        let (grams, view) = (&share.grams, share.factors.left());
        let (m, rank, dtype) = (view.rows(), view.cols(), view.dtype());
        let left_norm = grams.left_norm(rank);
        let left_norm_projected = projected.factor * diagonal(&projected.gram, rank).sqrt();
        let update_norm = grams.update_norm();
        let mut outcome = FactorOutcome {
            cosine,
            gain: if update_norm > 0.0 { left_norm_projected / left_norm } else { f64::NAN },
            left_norm,
            left_norm_projected,
            update_norm,
            update_norm_projected: projected.factor * grams.of_update(&projected.gram),
            projected: None,
            overflow: None,
        };
        if self.settings.keep_projected {
            let mut bytes = vec![0; view.nbytes()];
            let offset = |row: usize, col: usize| (row * rank + col) * dtype.size();
            outcome.overflow = write_rounded(&projected.columns, m, projected.factor, dtype, offset, &mut bytes);
            outcome.projected = Some(bytes);
        }
        outcome
    }

    /// The outcome where V is zero: B stays as it is.
    fn unchanged(&self, share: &Share<'_>) -> FactorOutcome {
        let view = share.factors.left();
        let rank = share.columns.len();
        let (left_norm, update_norm) = (share.grams.left_norm(rank), share.grams.update_norm());
        let projected = self.settings.keep_projected.then(|| {
            let (bytes, size) = (view.bytes(), view.dtype().size());
            let mut copy = Vec::with_capacity(view.nbytes());
            for row in 0..view.rows() {
                for col in 0..view.cols() {
                    let start = (row * view.row_stride() + col * view.col_stride()) * size;
                    copy.extend_from_slice(&bytes[start..start + size]);
                }
            }
            copy
        });
        FactorOutcome {
            cosine: f64::NAN,
            gain: if update_norm > 0.0 { 1.0 } else { f64::NAN },
            left_norm,
            left_norm_projected: left_norm,
            update_norm,
            update_norm_projected: update_norm,
            projected,
            overflow: None,
        }
    }
}

/// U·Uᵀ·B for B (r, m).
fn orthogonal(leading: &Leading, left: &[f32], m: usize) -> Projected<'static> {
    let coefficients = inner_products(&leading.vectors, left, m);
    let columns = combine(&leading.vectors, m, &coefficients, left.len() / m);
    let gram = gram(&columns, m);
    Projected { columns: Cow::Owned(columns), factor: 1.0, gram }
}

/// Divides by the power of two just above the largest magnitude, which is returned; so a second product with V
/// neither overflows nor falls below the smallest normal number where the result itself does not.
pub(super) fn normalise(values: &mut [f32]) -> f64 {
    let largest = values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    if largest == 0.0 || !largest.is_finite() {
        return 1.0;
    }
    let scale = f64::from(largest).log2().ceil().exp2();
    let inverse = 1.0 / scale;
    for value in values {
        *value = (f64::from(*value) * inverse) as f32;
    }
    scale
}

/// Finds out which weight is not finite.
fn not_finite(job: &Job) -> ProjectionError {
    let views = job.parts().iter().flat_map(|part| [part.aligned(), part.base()]);
    let found = views.into_iter().find_map(first_not_finite);
    found.map_or_else(|| ProjectionError::OutOfRange(job.name().to_owned()), ProjectionError::Checkpoint)
}
