//! CUDA host layer of safelora-fast: kernels compiled by NVRTC when first used, cached, and launched on the caller's stream.
//!
//! Building needs nothing of CUDA, and no CUDA library is loaded before [`Cuda::open`]. Tensors are passed as
//! addresses; the caller owns their memory. A launch allocates nothing, waits for nothing, and can be captured into a
//! graph.

mod argument;
mod cache;
mod call;
mod cuda;
mod device;
mod driver;
mod dtype;
mod error;
pub mod feature_distance;
mod library;
mod nvrtc;
mod plan;
mod source;
pub mod subspace_projection;

pub use cache::Cache;
pub use cuda::Cuda;
pub use dtype::Dtype;
pub use error::CudaError;
pub use nvrtc::Nvrtc;
pub use source::Source;
