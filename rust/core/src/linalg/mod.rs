//! Small dense pieces in f64 around the products with V.
//!
//! Vectors are stored as rows of f32: `count` vectors of `length` values, each contiguous. Every output element is summed
//! by one task in one fixed order without fused multiply-adds, so results are the same bits on every CPU and for every
//! number of threads. Functions run on the rayon pool they are called in.

mod eigen;
mod orthonormal;
mod products;

pub use eigen::{Eigen, symmetric_eigen};
pub use orthonormal::{orthonormal, removed};
pub use products::{combine, gram, inner_products};
