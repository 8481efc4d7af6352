//! Checkpoints on disk: safetensors files, sharded indices, and bounds-checked views of their tensors.
//!
//! Files are mapped, never copied. Truncating a mapped file kills the process, as with every mapped file. A file whose
//! header does not match its contents causes a [`CheckpointError`].

mod copy;
mod dtype;
mod error;
mod file;
mod header;
mod index;
mod pages;
mod view;

pub use copy::copy;
pub use dtype::kernel_dtype;
pub use error::{CheckpointError, Fault};
pub use file::SafetensorsFile;
pub use header::{Header, TensorEntry};
pub use index::{WeightMap, parse_index, read_index};
pub use pages::Pages;
pub use view::{Layout, View};
