//! The products with V, split over a private thread pool.

use super::{Difference, Level, ShapeError, scalar};

/// Threads, SIMD level and reusable workspace of the products with V.
#[derive(Debug)]
pub struct Engine {
    level: Level,
    pool: rayon::ThreadPool,
}

impl Engine {
    /// An engine with `threads` threads (at least one) at `level`.
    ///
    /// # Errors
    /// When the CPU lacks `level` or the system refuses the threads.
    pub fn new(threads: usize, level: Level) -> Result<Self, String> {
        if !level.is_available() {
            return Err(format!("this CPU has no {}", level.name()));
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|index| format!("safelora-fast-{index}"))
            .build()
            .map_err(|error| format!("cannot start {threads} threads: {error}"))?;
        Ok(Self { level, pool })
    }

    /// The SIMD level in use.
    #[must_use]
    pub const fn level(&self) -> Level {
        self.level
    }

    /// The number of threads in use.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// `y += Vᵀ·x` for `rank` vectors, returning ‖V‖²_F.
    ///
    /// `x` is (rank, rows) and `y` (rank, cols), both row-major: each vector is contiguous.
    ///
    /// # Errors
    /// When the lengths of `x` or `y` do not match.
    pub fn transposed_product(
        &mut self,
        v: &Difference<'_>,
        x: &[f32],
        rank: usize,
        y: &mut [f32],
    ) -> Result<f64, ShapeError> {
        check(x, rank, v.rows(), "x")?;
        check(y, rank, v.cols(), "y")?;
        Ok(scalar::transposed_product(v, x, rank, y))
    }

    /// `y = V·x` for `rank` vectors.
    ///
    /// `x` is (rank, cols) and `y` (rank, rows), both row-major: each vector is contiguous.
    ///
    /// # Errors
    /// When the lengths of `x` or `y` do not match.
    pub fn product(&mut self, v: &Difference<'_>, x: &[f32], rank: usize, y: &mut [f32]) -> Result<(), ShapeError> {
        check(x, rank, v.cols(), "x")?;
        check(y, rank, v.rows(), "y")?;
        scalar::product(v, x, rank, y);
        Ok(())
    }
}

fn check(vectors: &[f32], rank: usize, length: usize, name: &str) -> Result<(), ShapeError> {
    if rank.checked_mul(length) == Some(vectors.len()) {
        Ok(())
    } else {
        Err(ShapeError(format!("{name} holds {} values, not {rank}x{length}", vectors.len())))
    }
}
