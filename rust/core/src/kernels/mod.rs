//! Products with V = aligned − base that read both weights as they are stored and never form V, C = V·Vᵀ or ΔW.
//!
//! Everything here is deterministic: the same input gives the same bits on every SIMD level and for every number of
//! threads, because each output element is summed by one task in one fixed order with fused multiply-adds.

mod engine;
mod level;
mod matrix;
mod scalar;

pub use engine::Engine;
pub use level::Level;
pub use matrix::{Difference, Dtype, Matrix, ShapeError};
