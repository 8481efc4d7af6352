//! The run over many modules, and its outcomes.

use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use safelora_fast_core::checkpoint::View;
use safelora_fast_core::projection as core;
use safelora_fast_core::stream::{Next, Stream};

use crate::errors::{AdapterError, SettingsError, projection_error};
use crate::job::Job;
use crate::operator::Operator;
use crate::settings;

/// How long a signal may wait.
const SLICE: Duration = Duration::from_millis(50);

/// Result of projecting one adapter's factors in one module.
#[pyclass(frozen, module = "safelora_fast._core")]
pub(crate) struct FactorOutcome {
    inner: core::FactorOutcome,
    job: Arc<core::Job>,
    position: usize,
}

#[pymethods]
impl FactorOutcome {
    #[getter]
    fn cosine(&self) -> f64 {
        self.inner.cosine
    }

    #[getter]
    fn gain(&self) -> f64 {
        self.inner.gain
    }

    #[getter]
    fn lora_b_norm(&self) -> f64 {
        self.inner.lora_b_norm
    }

    #[getter]
    fn lora_b_norm_projected(&self) -> f64 {
        self.inner.lora_b_norm_projected
    }

    #[getter]
    fn update_norm(&self) -> f64 {
        self.inner.update_norm
    }

    #[getter]
    fn update_norm_projected(&self) -> f64 {
        self.inner.update_norm_projected
    }

    fn projected<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let missing = || PyValueError::new_err("the stream was made with keep_projected=False");
        bytes(py, self.inner.lora_b.as_ref().ok_or_else(missing)?, self.job.factors()[self.position].lora_b())
    }

    fn projected_lora_a<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let view = self.job.factors()[self.position].lora_a();
        self.inner.lora_a.as_ref().map(|rounded| bytes(py, rounded, view)).transpose()
    }

    fn __repr__(&self) -> String {
        format!("FactorOutcome(cosine={:.6}, gain={:.6})", self.inner.cosine, self.inner.gain)
    }
}

/// The elements of a projected LoRA factor, or an error if one is out of its dtype's range.
fn bytes<'py>(py: Python<'py>, rounded: &core::Rounded, view: &View) -> PyResult<Bound<'py, PyBytes>> {
    match rounded.overflow {
        None => Ok(PyBytes::new(py, &rounded.bytes)),
        Some(overflow) => Err(AdapterError::new_err(format!(
            "{}: tensor {:?}, once projected, holds {:.4e} at row {}, column {}, beyond the range of {:?}; store the \
             adapter in float32",
            view.file().path().display(),
            view.tensor(),
            overflow.value,
            overflow.row,
            overflow.col,
            view.dtype(),
        ))),
    }
}

/// Result of projecting one module.
#[pyclass(frozen, module = "safelora_fast._core")]
pub(crate) struct JobOutcome {
    index: usize,
    v_norm: f64,
    rank: Option<usize>,
    energy: Option<f64>,
    spectral_norm: Option<f64>,
    leading: Option<core::Leading>,
    factors: Vec<Py<FactorOutcome>>,
}

#[pymethods]
impl JobOutcome {
    #[getter]
    fn index(&self) -> usize {
        self.index
    }

    #[getter]
    fn v_norm(&self) -> f64 {
        self.v_norm
    }

    #[getter]
    fn rank(&self) -> Option<usize> {
        self.rank
    }

    #[getter]
    fn energy(&self) -> Option<f64> {
        self.energy
    }

    #[getter]
    fn spectral_norm(&self) -> Option<f64> {
        self.spectral_norm
    }

    fn left_vectors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let vectors = &self.kept()?.vectors;
        PyBytes::new_with(py, size_of_val(vectors.as_slice()), |bytes| {
            for (bytes, value) in bytes.as_chunks_mut().0.iter_mut().zip(vectors) {
                *bytes = value.to_le_bytes();
            }
            Ok(())
        })
    }

    fn singular_values(&self) -> PyResult<Vec<f64>> {
        self.kept().map(|leading| leading.values.clone())
    }

    #[getter]
    fn factors(&self, py: Python<'_>) -> Vec<Py<FactorOutcome>> {
        self.factors.iter().map(|factors| factors.clone_ref(py)).collect()
    }

    fn __repr__(&self) -> String {
        format!("JobOutcome(index={}, v_norm={:.6}, {} adapters)", self.index, self.v_norm, self.factors.len())
    }
}

impl JobOutcome {
    fn kept(&self) -> PyResult<&core::Leading> {
        let missing = "the stream was made without keep_subspace=True, or its operator uses no singular vectors";
        self.leading.as_ref().ok_or_else(|| PyValueError::new_err(missing))
    }
}

/// Runs jobs in the given order and yields their outcomes in that order.
#[pyclass(frozen, module = "safelora_fast._core")]
pub(crate) struct ProjectionStream {
    jobs: Vec<Arc<core::Job>>,
    stream: Stream,
}

#[pymethods]
impl ProjectionStream {
    #[new]
    #[pyo3(signature = (jobs, operator, *, keep_projected=true, keep_subspace=false, threads=None, seed=0))]
    #[allow(clippy::needless_pass_by_value, reason = "arguments are extracted by value")]
    fn new(
        jobs: Vec<PyRef<'_, Job>>,
        operator: PyRef<'_, Operator>,
        keep_projected: bool,
        keep_subspace: bool,
        threads: Option<usize>,
        seed: u64,
    ) -> PyResult<Self> {
        if !operator.inner.is_for_lora() {
            return Err(SettingsError::new_err("restore and extrapolate are for whole models, not for LoRA factors"));
        }
        let settings = core::Settings { operator: operator.inner, keep_projected, keep_subspace, seed };
        let jobs: Vec<_> = jobs.iter().map(|job| Arc::clone(&job.inner)).collect();
        let stream = Stream::start(jobs.clone(), settings, settings::threads(threads)?, settings::level()?)
            .map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
        Ok(Self { jobs, stream })
    }

    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<JobOutcome>> {
        if self.stream.is_foreign() {
            return Err(PyRuntimeError::new_err("this stream belongs to the process before the fork; make a new one"));
        }
        loop {
            match py.detach(|| self.stream.next(SLICE)) {
                Next::Outcome(index, outcome) => return self.outcome(py, index, outcome).map(Some),
                Next::Failed(_, error) => return Err(projection_error(&error)),
                Next::Finished => return Ok(None),
                Next::Pending => py.check_signals().inspect_err(|_| self.stream.cancel())?,
            }
        }
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.jobs.iter().map(|job| job.nbytes()).sum()
    }

    #[getter]
    fn bytes_done(&self) -> u64 {
        self.stream.bytes_done()
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.stream.close());
    }

    fn __repr__(&self) -> String {
        format!("ProjectionStream({} jobs, {} bytes done)", self.jobs.len(), self.stream.bytes_done())
    }
}

impl ProjectionStream {
    fn outcome(&self, py: Python<'_>, index: usize, outcome: core::JobOutcome) -> PyResult<JobOutcome> {
        let core::JobOutcome { v_norm, rank, energy, spectral_norm, leading, factors } = outcome;
        let factors = factors.into_iter().enumerate().map(|(position, inner)| {
            let job = Arc::clone(&self.jobs[index]);
            Py::new(py, FactorOutcome { inner, job, position })
        });
        let factors = factors.collect::<PyResult<_>>()?;
        Ok(JobOutcome { index, v_norm, rank, energy, spectral_norm, leading, factors })
    }
}
