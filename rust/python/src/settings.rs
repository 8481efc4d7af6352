//! Options in Python's spelling.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use safelora_fast_core::kernels::{Dtype, Level};
use safelora_fast_core::projection::Normalization;
use safelora_fast_core::stream;

use crate::errors::SettingsError;

/// The divisor of V·Vᵀ·B.
pub(crate) fn normalization(normalize: &str) -> PyResult<Normalization> {
    match normalize {
        "frobenius" => Ok(Normalization::Frobenius),
        "spectral" => Ok(Normalization::Spectral),
        _ => Err(SettingsError::new_err(format!(
            "unknown normalization {normalize:?}; use \"frobenius\" or \"spectral\""
        ))),
    }
}

/// Parses safetensors' dtype name; `owner` is the tensor's name for the error.
pub(crate) fn dtype(owner: &str, dtype: &str) -> PyResult<Dtype> {
    match dtype {
        "F32" => Ok(Dtype::F32),
        "BF16" => Ok(Dtype::Bf16),
        "F16" => Ok(Dtype::F16),
        _ => Err(PyValueError::new_err(format!("{owner} is {dtype}; use F32, BF16 or F16"))),
    }
}

/// The requested number of threads, or the default.
pub(crate) fn threads(threads: Option<usize>) -> PyResult<usize> {
    match threads {
        Some(0) => Err(SettingsError::new_err("threads is 0; give at least 1")),
        Some(threads) => Ok(threads),
        None => stream::default_threads().map_err(|error| SettingsError::new_err(error.to_string())),
    }
}

/// The SIMD level to use on this CPU.
pub(crate) fn level() -> PyResult<Level> {
    Level::from_environment().map_err(|error| SettingsError::new_err(error.to_string()))
}
