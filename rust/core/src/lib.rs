//! Checkpoint reading, SIMD kernels and projection of safelora-fast. No Python, no CUDA.

pub mod checkpoint;
pub mod feature_distance;
pub mod kernels;
pub mod limits;
pub mod linalg;
pub mod projection;
pub mod stream;
