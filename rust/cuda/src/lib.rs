//! CUDA host layer of safelora-fast: kernels compiled by NVRTC when first used, cached, and launched on the caller's stream.
//!
//! Nothing of CUDA is needed to build, and nothing of it is touched before [`Cuda::open`]. Tensors cross as addresses; their
//! memory is the caller's. A launch allocates nothing, waits for nothing, and can be captured into a graph.

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
mod source;
pub mod subspace_projection;

pub use cache::Cache;
pub use cuda::Cuda;
pub use dtype::Dtype;
pub use error::CudaError;
pub use nvrtc::Nvrtc;
pub use source::Source;
