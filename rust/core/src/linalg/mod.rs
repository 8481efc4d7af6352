//! Small dense linear algebra in f64 for the products with V.
//!
//! Vectors are stored as rows of f32: `count` vectors of `length` values, each contiguous. One task sums every output
//! element in a fixed order without fused multiply-adds, so results have the same bits on every CPU and for every
//! number of threads. Functions run on the current rayon pool.

mod eigen;
mod multiversion;
mod orthonormal;
mod products;

pub(crate) use multiversion::multiversion;

pub use eigen::{Eigen, symmetric_eigen};
pub use orthonormal::{orthonormal, removed};
pub use products::{combine, gram, inner_products};
