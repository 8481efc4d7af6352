//! One module: its weights, and the LoRA factors of every adapter.

use std::sync::Arc;

use pyo3::prelude::*;
use safelora_fast_core::projection as core;

use crate::checkpoint::View;
use crate::errors::job_error;

/// One slice of rows of V = aligned - base.
#[pyclass(frozen, module = "safelora_fast._core")]
pub(crate) struct Part {
    inner: core::Part,
}

#[pymethods]
impl Part {
    #[new]
    fn new(aligned: &View, base: &View) -> PyResult<Self> {
        let inner = core::Part::new(aligned.inner.clone(), base.inner.clone()).map_err(|error| job_error(&error))?;
        Ok(Self { inner })
    }

    fn __repr__(&self) -> String {
        let view = self.inner.aligned();
        format!("Part({:?}, {}x{})", view.tensor(), view.rows(), view.cols())
    }
}

/// The LoRA factors of one adapter for one module.
#[pyclass(frozen, module = "safelora_fast._core")]
pub(crate) struct Factors {
    inner: core::Factors,
}

#[pymethods]
impl Factors {
    #[new]
    fn new(lora_b: &View, lora_a: &View) -> PyResult<Self> {
        let inner =
            core::Factors::new(lora_b.inner.clone(), lora_a.inner.clone()).map_err(|error| job_error(&error))?;
        Ok(Self { inner })
    }

    fn __repr__(&self) -> String {
        format!("Factors({:?}, rank {})", self.inner.lora_b().tensor(), self.inner.rank())
    }
}

/// One module: V, and the LoRA factors of every adapter for this module.
#[pyclass(frozen, module = "safelora_fast._core")]
pub(crate) struct Job {
    pub(crate) inner: Arc<core::Job>,
}

#[pymethods]
impl Job {
    #[new]
    #[pyo3(signature = (name, parts, factors, *, transposed=false))]
    #[allow(clippy::needless_pass_by_value, reason = "arguments are extracted by value")]
    fn new(
        name: String,
        parts: Vec<PyRef<'_, Part>>,
        factors: Vec<PyRef<'_, Factors>>,
        transposed: bool,
    ) -> PyResult<Self> {
        let parts = parts.iter().map(|part| part.inner.clone()).collect();
        let factors = factors.iter().map(|factors| factors.inner.clone()).collect();
        let inner = core::Job::new(name, parts, factors, transposed).map_err(|error| job_error(&error))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.inner.nbytes()
    }

    fn __repr__(&self) -> String {
        let (m, n) = self.inner.shape();
        format!("Job({:?}, {m}x{n}, {} adapters)", self.inner.name(), self.inner.factors().len())
    }
}
