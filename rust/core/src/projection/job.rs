//! What belongs to one module: the weights that make V and the factors of every adapter.

use crate::checkpoint::View;
use crate::kernels::{Difference, ShapeError};

/// Views that do not fit together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// The two checkpoints, or the parts of one module, differ in shape.
    #[error("{0}")]
    Weights(String),
    /// The two factors of an adapter differ in rank.
    #[error("{0}")]
    Factors(String),
}

/// One block of rows of the stored matrix, in both checkpoints.
#[derive(Clone, Debug)]
pub struct Part {
    aligned: View,
    base: View,
}

impl Part {
    /// Pairs two views of the same shape with contiguous columns.
    ///
    /// # Errors
    /// When the shapes differ or columns are not contiguous.
    pub fn new(aligned: View, base: View) -> Result<Self, JobError> {
        let weights = |error: ShapeError| JobError::Weights(format!("{}: {error}", aligned.tensor()));
        Difference::new(aligned.matrix().map_err(weights)?, base.matrix().map_err(weights)?).map_err(weights)?;
        Ok(Self { aligned, base })
    }

    /// The aligned weight.
    #[must_use]
    pub const fn aligned(&self) -> &View {
        &self.aligned
    }

    /// The base weight.
    #[must_use]
    pub const fn base(&self) -> &View {
        &self.base
    }

    /// The block as the kernels read it.
    ///
    /// # Errors
    /// Never after [`Part::new`].
    pub fn difference(&self) -> Result<Difference<'_>, ShapeError> {
        Difference::new(self.aligned.matrix()?, self.base.matrix()?)
    }
}

/// The LoRA factors of one adapter for one module: ΔW = left·right, left (m, r), right (r, n).
#[derive(Clone, Debug)]
pub struct Factors {
    left: View,
    right: View,
}

impl Factors {
    /// Pairs two factors of the same rank.
    ///
    /// # Errors
    /// When the ranks differ.
    pub fn new(left: View, right: View) -> Result<Self, JobError> {
        if left.cols() == right.rows() {
            return Ok(Self { left, right });
        }
        let (left, right) = ((left.tensor(), left.cols()), (right.tensor(), right.rows()));
        let message = format!("{} has rank {} but {} has rank {}", left.0, left.1, right.0, right.1);
        Err(JobError::Factors(message))
    }

    /// B.
    #[must_use]
    pub const fn left(&self) -> &View {
        &self.left
    }

    /// A.
    #[must_use]
    pub const fn right(&self) -> &View {
        &self.right
    }

    /// r.
    #[must_use]
    pub const fn rank(&self) -> usize {
        self.left.cols()
    }
}

/// One module: V from parts stacked by stored rows, and the factors of every adapter that touches it.
#[derive(Clone, Debug)]
pub struct Job {
    name: String,
    parts: Vec<Part>,
    factors: Vec<Factors>,
    transposed: bool,
}

impl Job {
    /// A module whose stored matrix is V (m, n), or Vᵀ (n, m) when `transposed`.
    ///
    /// # Errors
    /// When there is no part, parts differ in width, or a factor does not fit V.
    pub fn new(name: String, parts: Vec<Part>, factors: Vec<Factors>, transposed: bool) -> Result<Self, JobError> {
        let job = Self { name, parts, factors, transposed };
        job.check().map(|()| job)
    }

    fn check(&self) -> Result<(), JobError> {
        let name = &self.name;
        let Some(first) = self.parts.first() else {
            return Err(JobError::Weights(format!("module {name}: no weights")));
        };
        let cols = first.aligned.cols();
        if let Some(part) = self.parts.iter().find(|part| part.aligned.cols() != cols) {
            let (tensor, found) = (part.aligned.tensor(), part.aligned.cols());
            return Err(JobError::Weights(format!(
                "module {name}: {tensor} has {found} columns, the first part {cols}"
            )));
        }
        let (m, n) = self.shape();
        for factors in &self.factors {
            let (left, right) = (factors.left.tensor(), factors.right.tensor());
            let (rows, cols) = (factors.left.rows(), factors.right.cols());
            if rows != m {
                return Err(JobError::Weights(format!("module {name}: {left} has {rows} rows but the weight has {m}")));
            }
            if cols != n {
                return Err(JobError::Weights(format!(
                    "module {name}: {right} has {cols} columns but the weight has {n}"
                )));
            }
        }
        Ok(())
    }

    /// Name of the module.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Blocks of rows of the stored matrix.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Factors of every adapter.
    #[must_use]
    pub fn factors(&self) -> &[Factors] {
        &self.factors
    }

    /// Whether the stored matrix is Vᵀ.
    #[must_use]
    pub const fn is_transposed(&self) -> bool {
        self.transposed
    }

    /// Shape (m, n) of V.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        let rows = self.parts.iter().map(|part| part.aligned.rows()).sum();
        let cols = self.parts.first().map_or(0, |part| part.aligned.cols());
        if self.transposed { (cols, rows) } else { (rows, cols) }
    }

    /// Bytes of both checkpoints that the module covers.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        self.parts.iter().map(|part| part.aligned.nbytes() + part.base.nbytes()).sum()
    }
}
