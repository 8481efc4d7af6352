//! Leading left singular vectors of V, by a restarted block Krylov method with Rayleigh-Ritz.
//!
//! Z holds orthonormal vectors of length n, and Y = V·Z. The eigenvectors Q of YᵀY rotate both to Ritz vectors.
//! Those of length m are U = Y·Q/σ. The component of Vᵀ·U outside Z is the residual, which shows when a vector has
//! converged. It is also the next block of Z. Each block costs two reads of V (Halko, Martinsson and Tropp 2011, arXiv 0909.4061,
//! section 4.5; Knyazev 2001 for the soft locking of converged vectors).

use std::sync::atomic::AtomicBool;

use super::{ProjectionError, Random, Stacked};
use crate::kernels::{Engine, ShapeError};
use crate::linalg::{Eigen, combine, gram, inner_products, orthonormal, removed, symmetric_eigen};

/// Extra Ritz vectors that are improved along with the wanted ones.
const OVERSAMPLING: usize = 8;
/// Residual, relative to σ₁, at which a singular vector counts as converged.
const TOLERANCE: f64 = 1e-5;
/// The iteration stops after this many blocks, even if a singular vector has not converged.
const MOST_BLOCKS: usize = 48;
/// Singular values below this fraction of σ₁ are lost in the rounding of the products with V.
const NUMERICAL_RANK: f64 = TOLERANCE;

/// The number of leading singular vectors of V to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Extent {
    /// This many, or all if V has fewer.
    Rank(usize),
    /// As many as needed for this fraction of ‖V‖².
    Energy(f64),
}

impl Extent {
    /// The extent for V (m, n), with the rank limited to the shorter side.
    pub(super) fn within(self, (m, n): (usize, usize)) -> Self {
        match self {
            Self::Rank(rank) => Self::Rank(rank.min(m).min(n)),
            Self::Energy(_) => self,
        }
    }
}

/// Leading left singular vectors of V and their singular values.
#[derive(Clone, Debug, Default)]
pub struct Leading {
    /// (rank, m), orthonormal.
    pub vectors: Vec<f32>,
    /// Descending.
    pub values: Vec<f64>,
}

impl Leading {
    /// σ₁; NaN if there is none.
    pub(super) fn largest(&self) -> f64 {
        self.values.first().copied().unwrap_or(f64::NAN)
    }

    /// Σσ².
    pub(super) fn energy(&self) -> f64 {
        self.values.iter().map(|value| value * value).sum()
    }
}

/// Number of vectors in the random start of an iteration.
pub(super) fn start_count(extent: Extent, (m, n): (usize, usize)) -> usize {
    let wanted = match extent {
        Extent::Rank(rank) => rank.saturating_add(OVERSAMPLING),
        Extent::Energy(_) => 2 * OVERSAMPLING,
    };
    wanted.min(m).min(n)
}

/// The iteration: Z, Y and their Gram matrix.
pub(super) struct Iteration<'a, 'v> {
    v: &'a mut Stacked<'v>,
    engine: &'a mut Engine,
    right: Vec<f32>,
    left: Vec<f32>,
    gram: Vec<f64>,
    extent: Extent,
    random: Random,
}

impl<'a, 'v> Iteration<'a, 'v> {
    /// Starts from orthonormal `right` (count, n) and `left` = V·right (count, m).
    pub(super) fn new(
        v: &'a mut Stacked<'v>,
        engine: &'a mut Engine,
        right: Vec<f32>,
        left: Vec<f32>,
        extent: Extent,
        random: Random,
    ) -> Self {
        let m = v.shape().0;
        let gram = engine.install(|| gram(&left, m));
        Self { v, engine, right, left, gram, extent, random }
    }

    /// Improves the vectors until the wanted ones have converged.
    pub(super) fn run(mut self, cancel: &AtomicBool) -> Result<Leading, Failure> {
        let n = self.v.shape().1;
        let norm_squared = self.v.norm_squared().unwrap_or(0.0);
        for _ in 0..MOST_BLOCKS {
            let ritz = symmetric_eigen(&self.gram, self.count());
            let wanted = self.wanted(&ritz, norm_squared);
            if self.count() == n {
                break;
            }
            ProjectionError::if_cancelled(cancel).map_err(|_| Failure::Cancelled)?;
            let block = self.next_block(&ritz, wanted)?;
            if block.is_empty() {
                break;
            }
            let most = 3 * wanted.unwrap_or(0) + 8 * OVERSAMPLING;
            if wanted.is_some_and(|wanted| wanted + OVERSAMPLING < self.count())
                && self.count() + block.len() / n > most
            {
                self.restart(&ritz, wanted.unwrap_or(0) + OVERSAMPLING);
            }
            ProjectionError::if_cancelled(cancel).map_err(|_| Failure::Cancelled)?;
            self.append(&block)?;
        }
        Ok(self.finish(norm_squared))
    }

    fn count(&self) -> usize {
        self.right.len() / self.v.shape().1
    }

    /// Number of wanted vectors, if the basis has that many.
    fn wanted(&self, ritz: &Eigen, norm_squared: f64) -> Option<usize> {
        match self.extent {
            Extent::Rank(rank) => Some(rank).filter(|rank| *rank <= ritz.values.len()),
            Extent::Energy(share) => {
                // ‖V‖² and the f32 products differ in the last digits.
                let goal = share * norm_squared * (1.0 - 1e-6);
                let mut energy = 0.0;
                let position = ritz.values.iter().position(|value| {
                    energy += value;
                    energy >= goal
                });
                position.map(|position| position + 1)
            }
        }
    }

    /// New directions: residuals of vectors that have not converged, or random ones if there are none.
    fn next_block(&mut self, ritz: &Eigen, wanted: Option<usize>) -> Result<Vec<f32>, ShapeError> {
        let (m, n) = self.v.shape();
        let (count, room) = (self.count(), n - self.count());
        let improved = wanted.map_or(count, |wanted| (wanted + OVERSAMPLING).min(count));
        let ritz_left = self.rotated_left(ritz, improved);
        let improved = ritz_left.len() / m;
        let mut images = vec![0.0; improved * n];
        self.v.transposed_product(self.engine, &ritz_left, improved, &mut images)?;
        let limit = TOLERANCE * ritz.values.first().map_or(0.0, |value| value.max(0.0).sqrt());
        let right = &self.right;
        // Zᵀ·Vᵀ·U = YᵀU = Q·σ: the component inside Z is known.
        let mut inside = columns(ritz, improved);
        for row in inside.chunks_exact_mut(improved.max(1)) {
            for (weight, value) in row.iter_mut().zip(&ritz.values) {
                *weight *= value.max(0.0).sqrt();
            }
        }
        let mut residuals = self.engine.install(|| combine(right, n, &inside, improved));
        for (residual, image) in residuals.iter_mut().zip(&images) {
            *residual = image - *residual;
        }
        let norms: Vec<f64> = residuals
            .chunks_exact(n)
            .map(|residual| residual.iter().map(|value| f64::from(*value) * f64::from(*value)).sum::<f64>().sqrt())
            .collect();
        let converged = norms.iter().take(wanted.unwrap_or(improved)).all(|norm| *norm <= limit);
        if converged && wanted.is_some() {
            return Ok(Vec::new());
        }
        let mut norms = norms.iter();
        let mut open = Vec::with_capacity(residuals.len());
        for residual in residuals.chunks_exact(n) {
            if norms.next().is_some_and(|norm| *norm > limit) {
                open.extend_from_slice(residual);
            }
        }
        residuals = open;
        if residuals.is_empty() {
            let mut random = Vec::new();
            self.random.extend(&mut random, (2 * OVERSAMPLING).min(room) * m);
            residuals.resize(random.len() / m * n, 0.0);
            self.v.transposed_product(self.engine, &random, random.len() / m, &mut residuals)?;
            residuals = self.engine.install(|| beyond_rounding(&residuals, right, n, limit));
        }
        let mut block = self.engine.install(|| orthonormal(&residuals, right, n));
        block.truncate(room * n);
        Ok(block)
    }

    /// The first `count` left Ritz vectors, without those lost in rounding.
    fn rotated_left(&self, ritz: &Eigen, count: usize) -> Vec<f32> {
        let m = self.v.shape().0;
        let floor = ritz.values.first().map_or(0.0, |value| value * NUMERICAL_RANK * NUMERICAL_RANK);
        let kept = ritz.values.iter().take(count).take_while(|value| **value > floor).count();
        let mut weights = columns(ritz, kept);
        for row in weights.chunks_exact_mut(kept.max(1)) {
            for (weight, value) in row.iter_mut().zip(&ritz.values) {
                *weight /= value.sqrt();
            }
        }
        self.engine.install(|| combine(&self.left, m, &weights, kept))
    }

    /// Keeps the first `count` Ritz vectors.
    fn restart(&mut self, ritz: &Eigen, count: usize) {
        let (m, n) = self.v.shape();
        let weights = columns(ritz, count);
        let (left, right) = (&self.left, &self.right);
        let rotated = self.engine.install(|| (combine(left, m, &weights, count), combine(right, n, &weights, count)));
        (self.left, self.right) = rotated;
        let left = &self.left;
        self.gram = self.engine.install(|| gram(left, m));
    }

    /// Adds a block to Z, and its image to Y.
    fn append(&mut self, block: &[f32]) -> Result<(), ShapeError> {
        let (m, n) = self.v.shape();
        let (old, new) = (self.count(), block.len() / n);
        let mut image = vec![0.0; new * m];
        self.v.product(self.engine, block, new, &mut image)?;
        let left = &self.left;
        let (across, own) = self.engine.install(|| (inner_products(left, &image, m), gram(&image, m)));
        let count = old + new;
        let mut joined = vec![0.0; count * count];
        for i in 0..count {
            for j in 0..count {
                joined[i * count + j] = match (i < old, j < old) {
                    (true, true) => self.gram[i * old + j],
                    (true, false) => across[i * new + j - old],
                    (false, true) => across[j * new + i - old],
                    (false, false) => own[(i - old) * new + j - old],
                };
            }
        }
        self.gram = joined;
        self.right.extend_from_slice(block);
        self.left.extend_from_slice(&image);
        Ok(())
    }

    fn finish(self, norm_squared: f64) -> Leading {
        let m = self.v.shape().0;
        let ritz = symmetric_eigen(&self.gram, self.count());
        let wanted = self.wanted(&ritz, norm_squared).unwrap_or(ritz.values.len());
        let rotated = self.rotated_left(&ritz, wanted);
        let vectors = self.engine.install(|| orthonormal(&rotated, &[], m));
        let kept = vectors.len() / m;
        let values = ritz.values.iter().take(kept).map(|value| value.max(0.0).sqrt()).collect();
        Leading { vectors, values }
    }
}

/// Why an iteration ended early.
#[derive(Debug)]
pub(super) enum Failure {
    Cancelled,
    Shape(ShapeError),
}

impl From<ShapeError> for Failure {
    fn from(error: ShapeError) -> Self {
        Self::Shape(error)
    }
}

impl Failure {
    pub(super) fn of(self, module: &str) -> ProjectionError {
        match self {
            Self::Cancelled => ProjectionError::Cancelled,
            Self::Shape(source) => ProjectionError::Shape { module: module.to_owned(), source },
        }
    }
}

/// The images of random vectors whose component outside `right` is more than rounding.
fn beyond_rounding(images: &[f32], right: &[f32], n: usize, limit: f64) -> Vec<f32> {
    let rest = removed(images, right, n);
    let norm = |vector: &[f32]| vector.iter().map(|value| f64::from(*value) * f64::from(*value)).sum::<f64>().sqrt();
    rest.chunks_exact(n).filter(|vector| norm(vector) > limit).flatten().copied().collect()
}

/// The first `count` columns of the eigenvectors, (n, count) row-major.
fn columns(ritz: &Eigen, count: usize) -> Vec<f64> {
    let n = ritz.values.len();
    ritz.vectors.chunks_exact(n.max(1)).flat_map(|row| row[..count].iter().copied()).collect()
}
