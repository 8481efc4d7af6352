//! The projection of one module.

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use super::factors::{append_columns, append_rows, first_not_finite};
use super::operator::{Products, Projected};
use super::outcome::{Grams, diagonal, product_norm};
use super::subspace::{Iteration, start_count};
use super::{
    FactorOutcome, Factors, Job, JobOutcome, Leading, Overflow, ProjectionError, Random, Rounded, Settings, Stacked,
    write_rounded,
};
use crate::checkpoint::View;
use crate::kernels::{Engine, ShapeError};
use crate::linalg::{gram, orthonormal};

/// Projects modules one after another, with the same threads and buffers.
#[derive(Debug)]
pub struct Projector {
    engine: Engine,
    settings: Settings,
    /// B of every adapter, (R, m).
    lora_b: Vec<f32>,
    /// A of one adapter, (r, n).
    lora_a: Vec<f32>,
    /// T = VᵀB, (R, n), each adapter's scaled by a power of two.
    reduced: Vec<f32>,
    /// S = V·T, (R, m).
    applied: Vec<f32>,
}

/// One adapter's part of the stacked columns.
struct Share<'a> {
    factors: &'a Factors,
    columns: Range<usize>,
    grams: Grams,
    /// The power of two that T was divided by.
    scale: f64,
}

impl Projector {
    /// Makes a projector on the threads of `engine`.
    #[must_use]
    pub const fn new(engine: Engine, settings: Settings) -> Self {
        Self { engine, settings, lora_b: Vec::new(), lora_a: Vec::new(), reduced: Vec::new(), applied: Vec::new() }
    }

    /// Projects every adapter's LoRA factors of one module.
    ///
    /// # Errors
    /// If a weight or LoRA factor is not finite, products leave the range of f32, or `cancel` is set.
    pub fn run(&mut self, job: &Job, cancel: &AtomicBool) -> Result<JobOutcome, ProjectionError> {
        let shape = |source: ShapeError| ProjectionError::Shape { module: job.name().to_owned(), source };
        let parts: Result<Vec<_>, _> = job.parts().iter().map(super::Part::difference).collect();
        let mut v = Stacked::new(parts.map_err(shape)?, job.is_transposed());
        let mut shares = self.load(job)?;
        let (m, n) = job.shape();
        let rank = self.lora_b.len() / m;

        let extent = self.settings.operator.extent().map(|extent| extent.within((m, n)));
        let mut random = Random::new(self.settings.seed, job.name());
        let started = extent.map_or(0, |extent| start_count(extent, (m, n)));
        random.extend(&mut self.lora_b, started * m);

        ProjectionError::if_cancelled(cancel)?;
        self.reduced.resize((rank + started) * n, 0.0);
        v.transposed_product(&mut self.engine, &self.lora_b, rank + started, &mut self.reduced).map_err(shape)?;
        for share in &mut shares {
            share.scale = normalize(&mut self.reduced[share.columns.start * n..share.columns.end * n]);
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
        let right = match &leading {
            Some(leading) if self.settings.operator.changes_lora_a() => {
                right_vectors(&mut self.engine, &mut v, leading).map_err(shape)?
            }
            _ => Vec::new(),
        };
        let mut factors = Vec::with_capacity(shares.len());
        for share in shares {
            let outcome = if v_norm > 0.0 {
                self.project(job, &share, v_norm, leading.as_ref(), &right)?
            } else {
                self.unchanged(&share)
            };
            factors.push(outcome);
        }
        let spectral_norm = leading.as_ref().map(|leading| leading.values.first().copied().unwrap_or(0.0));
        let leading = leading.filter(|_| self.settings.operator.uses_vectors());
        let energy = leading.as_ref().filter(|_| v_norm > 0.0).map(|leading| leading.energy() / norm_squared);
        let energy = energy.map(|energy| energy.min(1.0));
        let rank = leading.as_ref().map(|leading| leading.values.len());
        let leading = leading.filter(|_| self.settings.keep_subspace);
        Ok(JobOutcome { v_norm, rank, energy, spectral_norm, leading, factors })
    }

    /// Reads the LoRA factors of every adapter.
    fn load<'a>(&mut self, job: &'a Job) -> Result<Vec<Share<'a>>, ProjectionError> {
        let (m, n) = job.shape();
        self.lora_b.clear();
        let mut shares = Vec::with_capacity(job.factors().len());
        for factors in job.factors() {
            let start = self.lora_b.len();
            append_columns(factors.lora_b(), &mut self.lora_b)?;
            self.lora_a.clear();
            append_rows(factors.lora_a(), &mut self.lora_a)?;
            let (lora_b, lora_a) = (&self.lora_b[start..], &self.lora_a);
            let grams = self.engine.install(|| Grams { lora_b: gram(lora_b, m), lora_a: gram(lora_a, n) });
            shares.push(Share { factors, columns: start / m..self.lora_b.len() / m, grams, scale: 1.0 });
        }
        Ok(shares)
    }

    /// Returns the metrics of one adapter, and O·B.
    fn project(
        &self,
        job: &Job,
        share: &Share<'_>,
        v_norm: f64,
        leading: Option<&Leading>,
        right: &[f32],
    ) -> Result<FactorOutcome, ProjectionError> {
        let (m, n) = job.shape();
        let Range { start, end } = share.columns;
        let rank = end - start;
        let (reduced, applied) = (&self.reduced[start * n..end * n], &self.applied[start * m..end * m]);
        let (reduced_gram, applied_gram) = self.engine.install(|| (gram(reduced, n), gram(applied, m)));
        if !(diagonal(&reduced_gram, rank).is_finite() && diagonal(&applied_gram, rank).is_finite()) {
            return Err(ProjectionError::OutOfRange(job.name().to_owned()));
        }
        let products = Products {
            lora_b: &self.lora_b[start * m..end * m],
            rows: m,
            applied,
            applied_gram: &applied_gram,
            scale: share.scale,
            v_norm,
            leading,
        };
        let operator = self.settings.operator;
        let lora_b = operator.apply(&products, &self.engine);
        let lora_a = if operator.changes_lora_a() {
            let mut values = Vec::new();
            append_rows(share.factors.lora_a(), &mut values)?;
            self.engine.install(|| operator.apply_to_lora_a(right, &values, n))
        } else {
            None
        };
        let cosine = share.grams.cosine(&reduced_gram, &applied_gram, share.scale);
        Ok(self.outcome(share, &lora_b, lora_a.as_ref(), cosine))
    }

    fn outcome(
        &self,
        share: &Share<'_>,
        projected: &Projected<'_>,
        lora_a: Option<&Projected<'_>>,
        cosine: f64,
    ) -> FactorOutcome {
        let (grams, rank) = (&share.grams, share.factors.rank());
        let lora_b_norm = grams.lora_b_norm(rank);
        let lora_b_norm_projected = projected.factor * diagonal(&projected.gram, rank).sqrt();
        let update_norm = grams.update_norm();
        let gram_a = lora_a.map_or(&*grams.lora_a, |lora_a| &*lora_a.gram);
        let keep = self.settings.keep_projected;
        FactorOutcome {
            cosine,
            gain: if update_norm > 0.0 { lora_b_norm_projected / lora_b_norm } else { f64::NAN },
            lora_b_norm,
            lora_b_norm_projected,
            update_norm,
            update_norm_projected: projected.factor * product_norm(&projected.gram, gram_a),
            lora_b: keep.then(|| {
                let size = share.factors.lora_b().dtype().size();
                rounded(projected, share.factors.lora_b(), |row, col| (row * rank + col) * size)
            }),
            lora_a: lora_a.filter(|_| keep).map(|lora_a| {
                // Its vectors are the rows of A.
                let (view, size) = (share.factors.lora_a(), share.factors.lora_a().dtype().size());
                let Rounded { bytes, overflow } = rounded(lora_a, view, |col, row| (row * view.cols() + col) * size);
                let overflow = overflow.map(|Overflow { row, col, value }| Overflow { row: col, col: row, value });
                Rounded { bytes, overflow }
            }),
        }
    }

    /// The outcome if V is zero: B is unchanged.
    fn unchanged(&self, share: &Share<'_>) -> FactorOutcome {
        let view = share.factors.lora_b();
        let rank = share.columns.len();
        let (lora_b_norm, update_norm) = (share.grams.lora_b_norm(rank), share.grams.update_norm());
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
            lora_b_norm,
            lora_b_norm_projected: lora_b_norm,
            update_norm,
            update_norm_projected: update_norm,
            lora_b: projected.map(|bytes| Rounded { bytes, overflow: None }),
            lora_a: None,
        }
    }
}

/// Rounds a projected LoRA factor to the dtype of its view; `element(i, j)` is the index of element i of vector j.
fn rounded(projected: &Projected<'_>, view: &View, element: impl Fn(usize, usize) -> usize) -> Rounded {
    let mut bytes = vec![0; view.nbytes()];
    let length = projected.columns.len() / projected.count();
    let overflow = write_rounded(&projected.columns, length, projected.factor, view.dtype(), element, &mut bytes);
    Rounded { bytes, overflow }
}

/// The right singular vectors W = VᵀU/σ, (k, n), orthonormal.
pub(super) fn right_vectors(
    engine: &mut Engine,
    v: &mut Stacked<'_>,
    leading: &Leading,
) -> Result<Vec<f32>, ShapeError> {
    let (n, count) = (v.shape().1, leading.values.len());
    let mut images = vec![0.0; count * n];
    if count > 0 {
        v.transposed_product(engine, &leading.vectors, count, &mut images)?;
    }
    for (image, value) in images.chunks_exact_mut(n).zip(&leading.values) {
        for element in image {
            *element = (f64::from(*element) / value) as f32;
        }
    }
    Ok(engine.install(|| orthonormal(&images, &[], n)))
}

/// Divides by the power of two just above the largest magnitude, and returns it. Then a second product with V
/// overflows, or underflows, only if the result does.
pub(super) fn normalize(values: &mut [f32]) -> f64 {
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

/// Finds the weight that is not finite.
pub(super) fn not_finite(job: &Job) -> ProjectionError {
    let views = job.parts().iter().flat_map(|part| [part.aligned(), part.base()]);
    let found = views.into_iter().find_map(first_not_finite);
    found.map_or_else(|| ProjectionError::OutOfRange(job.name().to_owned()), ProjectionError::Checkpoint)
}
