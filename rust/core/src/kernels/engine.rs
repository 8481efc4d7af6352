//! The products with V, divided among a private thread pool.

use std::sync::{Mutex, PoisonError};

use super::workspace::Workspace;
use super::{Difference, Level, ShapeError, StartError, micro, norm, product, transposed};

/// Threads, SIMD level and reusable workspace for the products with V.
#[derive(Debug)]
pub struct Engine {
    level: Level,
    pool: rayon::ThreadPool,
    workspace: Workspace,
}

/// Calls a function that is generic over the level.
macro_rules! at_level {
    ($level:expr, $module:ident :: $function:ident, $arguments:tt) => {
        match $level {
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::Level::Avx512 => $module::$function::<$crate::kernels::Avx512> $arguments,
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::Level::Avx2 => $module::$function::<$crate::kernels::Avx2> $arguments,
            _ => $module::$function::<$crate::kernels::Scalar> $arguments,
        }
    };
}
pub(crate) use at_level;

impl Engine {
    /// Makes an engine with `threads` threads (at least one) at `level`.
    ///
    /// # Errors
    /// If the CPU lacks `level` or the system cannot start the threads.
    pub fn new(threads: usize, level: Level) -> Result<Self, StartError> {
        let level = level.check()?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|index| format!("safelora-fast-{index}"))
            .build()
            .map_err(|source| StartError::Pool { threads, source })?;
        Ok(Self { level, pool, workspace: Workspace::default() })
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

    /// Runs other work on the engine's threads.
    pub fn install<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.pool.install(work)
    }

    /// Calls `work` once on every item, on the calling thread and on enough of the engine's threads to make up its
    /// number. The caller starts at once, while the others wake up. Each thread takes a range of adjacent items in
    /// order, because sequential reads are fastest, and then helps with the rest of the others' ranges.
    pub fn share<T: Send>(&self, mut items: Vec<T>, work: impl Fn(T) + Sync) {
        let size = items.len().div_ceil(self.threads()).max(1);
        let mut stretches = Vec::new();
        while !items.is_empty() {
            let rest = items.split_off(size.min(items.len()));
            stretches.push(Mutex::new(std::mem::replace(&mut items, rest).into_iter()));
        }
        let (stretches, work) = (&stretches, &work);
        let take = move |first: usize| {
            for stretch in stretches.iter().cycle().skip(first).take(stretches.len()) {
                let next = || stretch.lock().unwrap_or_else(PoisonError::into_inner).next();
                while let Some(item) = next() {
                    work(item);
                }
            }
        };
        if stretches.len() < 2 {
            return take(0);
        }
        self.pool.in_place_scope(|scope| {
            for first in 1..stretches.len() {
                scope.spawn(move |_| take(first));
            }
            take(0);
        });
    }

    /// `y += Vᵀ·x` for `rank` vectors. Returns ‖V‖² (Frobenius).
    ///
    /// `x` is (rank, rows) and `y` (rank, cols), both row-major: each vector is contiguous.
    /// ‖V‖² is not finite if V contains NaN or infinity.
    ///
    /// # Errors
    /// If the lengths of `x` or `y` do not match.
    pub fn transposed_product(
        &mut self,
        v: &Difference<'_>,
        x: &[f32],
        rank: usize,
        y: &mut [f32],
    ) -> Result<f64, ShapeError> {
        check(x, rank, v.rows(), "x")?;
        check(y, rank, v.cols(), "y")?;
        let (level, threads, workspace) = (self.level, self.pool.current_num_threads(), &mut self.workspace);
        Ok(self.pool.install(|| {
            let squares = at_level!(level, transposed::run, (v, x, rank, y, threads, workspace));
            if norm::is_doubtful(squares, v) { at_level!(level, norm::run, (v)) } else { squares }
        }))
    }

    /// `y = V·x` for `rank` vectors.
    ///
    /// `x` is (rank, cols) and `y` (rank, rows), both row-major: each vector is contiguous.
    ///
    /// # Errors
    /// If the lengths of `x` or `y` do not match.
    pub fn product(&mut self, v: &Difference<'_>, x: &[f32], rank: usize, y: &mut [f32]) -> Result<(), ShapeError> {
        check(x, rank, v.cols(), "x")?;
        check(y, rank, v.rows(), "y")?;
        let (level, threads, workspace) = (self.level, self.pool.current_num_threads(), &mut self.workspace);
        self.pool.install(|| at_level!(level, product::run, (v, x, rank, y, threads, workspace)));
        Ok(())
    }
}

/// Runs `steps` fused multiply-adds in each lane of enough independent chains to keep the CPU busy. Returns the number
/// of lanes. The CPU must support the level.
pub(crate) fn fused_chains(level: Level, steps: usize) -> usize {
    at_level!(level, micro::fused_chains, (steps))
}

fn check(vectors: &[f32], rank: usize, length: usize, name: &'static str) -> Result<(), ShapeError> {
    if rank.checked_mul(length) == Some(vectors.len()) {
        Ok(())
    } else {
        Err(ShapeError::Vectors { name, values: vectors.len(), rank, length })
    }
}
