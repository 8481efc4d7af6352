//! The Python module `safelora_fast._core`.

mod checkpoint;
mod errors;

use pyo3::prelude::*;

/// Rust host layer of safelora-fast.
#[pymodule]
mod _core {
    use super::{Bound, PyModule, PyResult};
    use pyo3::types::PyModuleMethods;

    #[pymodule_export]
    use crate::checkpoint::{SafetensorsFile, View, read_index};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
