//! Leading left singular vectors of V, by a restarted block Krylov method with Rayleigh-Ritz.
//!
//! Z holds orthonormal vectors of length n, and Y = V·Z. The eigenvectors Q of YᵀY rotate both to Ritz vectors.
//! Those of length m are U = Y·Q/σ. The component of Vᵀ·U outside Z is the residual, which shows when a vector has
//! converged. It is also the next block of Z. Each block costs two reads of V (Halko, Martinsson and Tropp 2011, arXiv 0909.4061,
//! section 4.5; Knyazev 2001 for the soft locking of converged vectors).

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use super::{ProjectionError, Random, Stacked};
use crate::kernels::{Engine, ShapeError};
use crate::linalg::{Eigen, combine, gram, inner_products, orthonormal, removed, symmetric_eigen};

/// Extra Ritz vectors that are improved along with the wanted ones.
const OVERSAMPLING: usize = 8;
/// Residual, relative to σ₁, at which a singular vector counts as converged.
const TOLERANCE: f64 = 1e-5;
/// The iteration stops after this many blocks of the first one's size, even if a singular vector has not converged.
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
    /// Number of leading Ritz vectors that had converged when they were last looked at.
    settled: usize,
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
        Self { v, engine, right, left, gram, extent, random, settled: 0 }
    }

    /// Improves the vectors until the wanted ones have converged.
    pub(super) fn run(mut self, cancel: &AtomicBool) -> Result<Leading, Failure> {
        let n = self.v.shape().1;
        let norm_squared = self.v.norm_squared().unwrap_or(0.0);
        let mut room = MOST_BLOCKS * self.count().max(2 * OVERSAMPLING);
        while room > 0 {
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
            room = room.saturating_sub(block.len() / n);
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

    /// New directions: residuals of vectors that have not converged, or random ones if there are none. Few at a time
    /// reach the same accuracy with fewer products than all together.
    fn next_block(&mut self, ritz: &Eigen, wanted: Option<usize>) -> Result<Vec<f32>, ShapeError> {
        let (m, n) = self.v.shape();
        let room = n - self.count();
        let limit = TOLERANCE * ritz.values.first().map_or(0.0, |value| value.max(0.0).sqrt());
        let known = self.above_rounding(ritz);
        let mut residuals = Vec::new();
        if let Some(wanted) = wanted {
            let (needed, improved) = (wanted.min(known), (wanted + OVERSAMPLING).min(known));
            let most = (improved / 4).max(2 * OVERSAMPLING);
            let mut open = Vec::new();
            let mut checked = needed;
            while open.is_empty() && self.settled < needed {
                checked = self.settled;
                let end = (self.settled + most).min(improved);
                open = self.residuals(ritz, self.settled..end, limit)?;
                self.settled = open.first().map_or(end, |(index, _)| *index);
            }
            if self.settled >= needed {
                // Later vectors may have changed the first ones.
                if checked > 0 {
                    open = self.residuals(ritz, 0..needed, limit)?;
                    self.settled = open.first().map_or(needed, |(index, _)| *index);
                }
                if self.settled >= needed {
                    return Ok(Vec::new());
                }
            }
            residuals.extend(open.into_iter().take(most).flat_map(|(_, residual)| residual));
        } else {
            let open = self.residuals(ritz, 0..known, limit)?;
            residuals.extend(open.into_iter().flat_map(|(_, residual)| residual));
        }
        let right = &self.right;
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

    /// Vᵀ·U outside Z for some Ritz vectors U, where its norm is above the limit, each with the position of U.
    fn residuals(
        &mut self,
        ritz: &Eigen,
        range: Range<usize>,
        limit: f64,
    ) -> Result<Vec<(usize, Vec<f32>)>, ShapeError> {
        let n = self.v.shape().1;
        let left = self.rotated_left(ritz, range.clone());
        let mut images = vec![0.0; range.len() * n];
        self.v.transposed_product(self.engine, &left, range.len(), &mut images)?;
        // Zᵀ·Vᵀ·U = YᵀU = Q·σ: the component inside Z is known.
        let right = &self.right;
        let inside = columns(ritz, range.clone(), f64::sqrt);
        let inside = self.engine.install(|| combine(right, n, &inside, range.len()));
        for (image, inside) in images.iter_mut().zip(&inside) {
            *image -= inside;
        }
        let norm = |vector: &[f32]| vector.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        let residuals = range.zip(images.chunks_exact(n.max(1)));
        Ok(residuals.filter(|(_, image)| norm(image) > limit).map(|(index, image)| (index, image.to_vec())).collect())
    }

    /// Number of Ritz vectors that are not lost in rounding.
    fn above_rounding(&self, ritz: &Eigen) -> usize {
        let floor = ritz.values.first().map_or(0.0, |value| value * NUMERICAL_RANK * NUMERICAL_RANK);
        ritz.values.iter().take(self.count()).take_while(|value| **value > floor).count()
    }

    /// Left Ritz vectors.
    fn rotated_left(&self, ritz: &Eigen, range: Range<usize>) -> Vec<f32> {
        let weights = columns(ritz, range.clone(), |value| value.sqrt().recip());
        self.engine.install(|| combine(&self.left, self.v.shape().0, &weights, range.len()))
    }

    /// Keeps the first `count` Ritz vectors.
    fn restart(&mut self, ritz: &Eigen, count: usize) {
        let (m, n) = self.v.shape();
        let weights = columns(ritz, 0..count, |_| 1.0);
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
        let rotated = self.rotated_left(&ritz, 0..wanted.min(self.above_rounding(&ritz)));
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

/// Some columns of the eigenvectors, (n, range) row-major, each multiplied by a function of its eigenvalue.
fn columns(ritz: &Eigen, range: Range<usize>, factor: impl Fn(f64) -> f64) -> Vec<f64> {
    let factors: Vec<f64> = ritz.values[range.clone()].iter().map(|value| factor(value.max(0.0))).collect();
    let rows = ritz.vectors.chunks_exact(ritz.values.len().max(1));
    rows.flat_map(|row| row[range.clone()].iter().zip(&factors).map(|(value, factor)| value * factor)).collect()
}
