//! The CPU features and thread count of this machine.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::settings;

/// Return which CPU features are present, of those that select a kernel.
#[pyfunction]
pub(crate) fn cpu_features(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let features = PyDict::new(py);
    for (name, available) in detected() {
        features.set_item(name, available)?;
    }
    Ok(features)
}

#[cfg(target_arch = "x86_64")]
fn detected() -> [(&'static str, bool); 9] {
    [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512dq", is_x86_feature_detected!("avx512dq")),
        ("avx512vl", is_x86_feature_detected!("avx512vl")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
        ("avx512fp16", is_x86_feature_detected!("avx512fp16")),
    ]
}

#[cfg(not(target_arch = "x86_64"))]
fn detected() -> [(&'static str, bool); 0] {
    []
}

/// Return the level that the kernels use.
#[pyfunction]
pub(crate) fn kernel_level() -> PyResult<&'static str> {
    settings::level().map(safelora_fast_core::kernels::Level::name)
}

/// Return the number of threads used by default.
#[pyfunction]
pub(crate) fn default_threads() -> PyResult<usize> {
    settings::threads(None)
}
