//! Element types of a file, and the subset that the kernels support.

use safetensors::Dtype as Stored;

use crate::kernels::Dtype;

/// The kernels' name for a stored element type, or `None` if they do not support it.
#[must_use]
pub const fn kernel_dtype(stored: Stored) -> Option<Dtype> {
    match stored {
        Stored::F32 => Some(Dtype::F32),
        Stored::BF16 => Some(Dtype::Bf16),
        Stored::F16 => Some(Dtype::F16),
        _ => None,
    }
}

/// The element type with this name in a header, if safetensors defines it.
pub(super) fn parse(word: &str) -> Option<Stored> {
    serde_json::from_value(serde_json::Value::String(word.to_owned())).ok()
}
