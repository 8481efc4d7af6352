//! One module: the weights that make V, and the LoRA factors of every adapter.

use crate::checkpoint::View;
use crate::kernels::{Difference, ShapeError};

/// Views that do not fit together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// The two weights of a part do not fit together.
    #[error("{tensor}: {source}")]
    Part {
        /// The aligned tensor.
        tensor: String,
        /// The shape error.
        source: ShapeError,
    },
    /// A module has no parts.
    #[error("module {0}: no weights")]
    NoWeights(String),
    /// Parts differ in width.
    #[error("module {module}: {tensor} has {found} columns, the first part {expected}")]
    PartWidth {
        /// Name of the module.
        module: String,
        /// The aligned tensor of the part that differs.
        tensor: String,
        /// Its number of columns.
        found: usize,
        /// Columns of the first part.
        expected: usize,
    },
    /// B and V differ in rows.
    #[error("module {module}: {tensor} has {found} rows but the weight has {expected}")]
    Rows {
        /// Name of the module.
        module: String,
        /// Name of B's tensor.
        tensor: String,
        /// Its number of rows.
        found: usize,
        /// Rows of V.
        expected: usize,
    },
    /// A and V differ in columns.
    #[error("module {module}: {tensor} has {found} columns but the weight has {expected}")]
    Columns {
        /// Name of the module.
        module: String,
        /// Name of A's tensor.
        tensor: String,
        /// Its number of columns.
        found: usize,
        /// Columns of V.
        expected: usize,
    },
    /// B and A of one adapter have different ranks.
    #[error("{} has rank {} but {} has rank {}", lora_b.0, lora_b.1, lora_a.0, lora_a.1)]
    Ranks {
        /// Tensor name and rank of B.
        lora_b: (String, usize),
        /// Tensor name and rank of A.
        lora_a: (String, usize),
    },
}

/// One slice of rows of the stored matrix, in both checkpoints.
#[derive(Clone, Debug)]
pub struct Part {
    aligned: View,
    base: View,
}

impl Part {
    /// Pairs two views of the same shape with contiguous columns.
    ///
    /// # Errors
    /// If the shapes differ or columns are not contiguous.
    pub fn new(aligned: View, base: View) -> Result<Self, JobError> {
        let part = |source| JobError::Part { tensor: aligned.tensor().to_owned(), source };
        Difference::new(aligned.matrix().map_err(part)?, base.matrix().map_err(part)?).map_err(part)?;
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

    /// The part as a kernel operand.
    ///
    /// # Errors
    /// Never after [`Part::new`].
    pub fn difference(&self) -> Result<Difference<'_>, ShapeError> {
        Difference::new(self.aligned.matrix()?, self.base.matrix()?)
    }
}

/// The LoRA factors of one adapter for one module: ΔW = B·A, B (m, r), A (r, n).
#[derive(Clone, Debug)]
pub struct Factors {
    lora_b: View,
    lora_a: View,
}

impl Factors {
    /// Pairs B and A of the same rank.
    ///
    /// # Errors
    /// If the ranks differ.
    pub fn new(lora_b: View, lora_a: View) -> Result<Self, JobError> {
        if lora_b.cols() == lora_a.rows() {
            return Ok(Self { lora_b, lora_a });
        }
        let lora_b = (lora_b.tensor().to_owned(), lora_b.cols());
        Err(JobError::Ranks { lora_b, lora_a: (lora_a.tensor().to_owned(), lora_a.rows()) })
    }

    /// B.
    #[must_use]
    pub const fn lora_b(&self) -> &View {
        &self.lora_b
    }

    /// A.
    #[must_use]
    pub const fn lora_a(&self) -> &View {
        &self.lora_a
    }

    /// r.
    #[must_use]
    pub const fn rank(&self) -> usize {
        self.lora_b.cols()
    }
}

/// One module: V as parts stacked by stored rows, and the LoRA factors of every adapter for it.
#[derive(Clone, Debug)]
pub struct Job {
    name: String,
    parts: Vec<Part>,
    factors: Vec<Factors>,
    transposed: bool,
}

impl Job {
    /// Makes a module. The stored matrix is V (m, n), or Vᵀ (n, m) if `transposed`.
    ///
    /// # Errors
    /// If there are no parts, parts differ in width, or B or A does not fit V.
    pub fn new(name: String, parts: Vec<Part>, factors: Vec<Factors>, transposed: bool) -> Result<Self, JobError> {
        let job = Self { name, parts, factors, transposed };
        job.check().map(|()| job)
    }

    fn check(&self) -> Result<(), JobError> {
        let module = || self.name.clone();
        let Some(first) = self.parts.first() else {
            return Err(JobError::NoWeights(module()));
        };
        let expected = first.aligned.cols();
        if let Some(part) = self.parts.iter().find(|part| part.aligned.cols() != expected) {
            let (tensor, found) = (part.aligned.tensor().to_owned(), part.aligned.cols());
            return Err(JobError::PartWidth { module: module(), tensor, found, expected });
        }
        let (m, n) = self.shape();
        for Factors { lora_b, lora_a } in &self.factors {
            if lora_b.rows() != m {
                let (tensor, found) = (lora_b.tensor().to_owned(), lora_b.rows());
                return Err(JobError::Rows { module: module(), tensor, found, expected: m });
            }
            if lora_a.cols() != n {
                let (tensor, found) = (lora_a.tensor().to_owned(), lora_a.cols());
                return Err(JobError::Columns { module: module(), tensor, found, expected: n });
            }
        }
        Ok(())
    }

    /// Name of the module.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Slices of rows of the stored matrix.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// LoRA factors of every adapter.
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

    /// Bytes of both checkpoints that the module reads.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        self.parts.iter().map(|part| part.aligned.nbytes() + part.base.nbytes()).sum()
    }
}
