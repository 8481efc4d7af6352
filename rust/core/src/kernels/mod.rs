//! Products with V = aligned − base that read both weights as stored and never form V, C = V·Vᵀ or ΔW.
//!
//! Everything here is deterministic. The same input gives the same bits on every SIMD level and for every number of
//! threads, because one task sums each output element in a fixed order with fused multiply-adds.

// Register tiles are arrays with constant bounds: indices keep the loops of a micro kernel in step. Parts of a micro
// kernel must be inlined whatever their size, and a level imports all its intrinsics.
#![allow(clippy::needless_range_loop, clippy::inline_always, clippy::wildcard_imports)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod engine;
mod error;
mod level;
mod matrix;
mod micro;
mod norm;
mod product;
mod scalar;
mod simd;
mod transposed;
mod workspace;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub use engine::Engine;
pub(crate) use engine::{at_level, fused_chains};
pub use error::{ShapeError, StartError};
pub use level::{LEVEL_VARIABLE, Level, LevelError};
pub use matrix::{Difference, Dtype, Matrix};
pub(crate) use scalar::Scalar;
pub(crate) use simd::{GROUP, LANES, Simd, prefetch};
