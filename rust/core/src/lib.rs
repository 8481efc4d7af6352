//! Checkpoint reading, SIMD kernels and row checks of safelora-fast. No Python, no CUDA.

pub mod checkpoint;
pub mod feature_distance;
pub mod kernels;
pub mod limits;
pub mod linalg;
pub mod projection;
pub mod rows;
pub mod stream;
