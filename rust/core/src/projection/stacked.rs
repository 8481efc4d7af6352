//! V as stored slices of rows, possibly of its transpose.

use crate::kernels::{Difference, Engine, ShapeError};

/// V (m, n) as slices of rows of the stored matrix, which is V or, if transposed, Vᵀ.
#[derive(Debug)]
pub struct Stacked<'a> {
    parts: Vec<Difference<'a>>,
    transposed: bool,
    scratch: Vec<f32>,
    norm_squared: Option<f64>,
}

impl<'a> Stacked<'a> {
    /// Stacks slices of the same width.
    #[must_use]
    pub const fn new(parts: Vec<Difference<'a>>, transposed: bool) -> Self {
        Self { parts, transposed, scratch: Vec::new(), norm_squared: None }
    }

    /// Shape (m, n) of V.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        let (rows, cols) = (self.stored_rows(), self.parts.first().map_or(0, Difference::cols));
        if self.transposed { (cols, rows) } else { (rows, cols) }
    }

    /// Whether the stored matrix is Vᵀ.
    #[must_use]
    pub const fn is_transposed(&self) -> bool {
        self.transposed
    }

    /// ‖V‖² (Frobenius), available after the stored matrix has been multiplied from the left.
    #[must_use]
    pub const fn norm_squared(&self) -> Option<f64> {
        self.norm_squared
    }

    /// `y = Vᵀ·x`, x (rank, m) and y (rank, n), each vector contiguous.
    ///
    /// # Errors
    /// If the lengths of `x` or `y` do not match.
    pub fn transposed_product(
        &mut self,
        engine: &mut Engine,
        x: &[f32],
        rank: usize,
        y: &mut [f32],
    ) -> Result<(), ShapeError> {
        if self.transposed {
            self.stored_times(engine, x, rank, y)
        } else {
            self.stored_transposed_times(engine, x, rank, y)
        }
    }

    /// `y = V·x`, x (rank, n) and y (rank, m), each vector contiguous.
    ///
    /// # Errors
    /// If the lengths of `x` or `y` do not match.
    pub fn product(&mut self, engine: &mut Engine, x: &[f32], rank: usize, y: &mut [f32]) -> Result<(), ShapeError> {
        if self.transposed {
            self.stored_transposed_times(engine, x, rank, y)
        } else {
            self.stored_times(engine, x, rank, y)
        }
    }

    /// `y = Mᵀ·x` for the stored matrix M.
    fn stored_transposed_times(
        &mut self,
        engine: &mut Engine,
        x: &[f32],
        rank: usize,
        y: &mut [f32],
    ) -> Result<(), ShapeError> {
        y.fill(0.0);
        let rows = self.stored_rows();
        let mut squares = 0.0;
        if let [part] = self.parts.as_slice() {
            squares = engine.transposed_product(part, x, rank, y)?;
        } else {
            let mut first = 0;
            for part in &self.parts {
                self.scratch.clear();
                for vector in x.chunks_exact(rows) {
                    self.scratch.extend_from_slice(&vector[first..first + part.rows()]);
                }
                squares += engine.transposed_product(part, &self.scratch, rank, y)?;
                first += part.rows();
            }
        }
        self.norm_squared = Some(squares);
        Ok(())
    }

    /// `y = M·x` for the stored matrix M.
    fn stored_times(&mut self, engine: &mut Engine, x: &[f32], rank: usize, y: &mut [f32]) -> Result<(), ShapeError> {
        if let [part] = self.parts.as_slice() {
            return engine.product(part, x, rank, y);
        }
        let rows = self.stored_rows();
        let mut first = 0;
        for part in &self.parts {
            self.scratch.resize(rank * part.rows(), 0.0);
            engine.product(part, x, rank, &mut self.scratch)?;
            for (vector, block) in y.chunks_exact_mut(rows).zip(self.scratch.chunks_exact(part.rows())) {
                vector[first..first + part.rows()].copy_from_slice(block);
            }
            first += part.rows();
        }
        Ok(())
    }

    fn stored_rows(&self) -> usize {
        self.parts.iter().map(Difference::rows).sum()
    }
}
