//! Checkpoints on disk: safetensors files, sharded indices, and bounds-checked views of their tensors.
//!
//! Files are mapped, never copied. Whoever truncates a mapped file takes the process down, as with every mapped file;
//! a file that merely lies about its contents is refused with a [`CheckpointError`].

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
