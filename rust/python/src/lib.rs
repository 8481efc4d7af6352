//! The Python module `safelora_fast._core`.

use pyo3::prelude::*;

/// Rust host layer of safelora-fast.
#[pymodule]
mod _core {
    use super::{Bound, PyModule, PyResult};
    use pyo3::types::PyModuleMethods;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
