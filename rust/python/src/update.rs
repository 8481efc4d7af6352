//! The projection of a full update.

use std::sync::Mutex;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use safelora_fast_core::projection as core;

use crate::checkpoint::View;
use crate::errors::{CheckpointError, projection_error};
use crate::job::Job;
use crate::operator::Operator;
use crate::{engines, settings};

/// Result of projecting the full update of one module.
#[pyclass(frozen, get_all, module = "safelora_fast._core")]
pub(crate) struct UpdateOutcome {
    v_norm: f64,
    rank: Option<usize>,
    energy: Option<f64>,
    cosine: f64,
    update_norm: f64,
    update_norm_projected: f64,
}

#[pymethods]
impl UpdateOutcome {
    fn __repr__(&self) -> String {
        format!("UpdateOutcome(cosine={:.6}, update_norm={:.6})", self.cosine, self.update_norm)
    }
}

/// Write aligned + O·(finetuned - aligned) to (address, length), row-major as stored, in the dtype of `finetuned`.
#[pyfunction]
#[pyo3(signature = (job, finetuned, operator, output, *, cosine=true, vectors=None, threads=None))]
#[allow(clippy::needless_pass_by_value, clippy::too_many_arguments, reason = "arguments are extracted by value")]
pub(crate) fn project_update(
    py: Python<'_>,
    job: &Job,
    finetuned: Vec<PyRef<'_, View>>,
    operator: &Operator,
    output: (usize, usize),
    cosine: bool,
    vectors: Option<(usize, usize)>,
    threads: Option<usize>,
) -> PyResult<UpdateOutcome> {
    let (threads, level) = (settings::threads(threads)?, settings::level()?);
    let (job, operator) = (&job.inner, operator.inner);
    let finetuned: Vec<_> = finetuned.iter().map(|view| view.inner.clone()).collect();
    let fits = finetuned.len() == job.parts().len()
        && finetuned.iter().zip(job.parts()).all(|(view, part)| {
            let aligned = part.aligned();
            (view.rows(), view.cols(), view.col_stride()) == (aligned.rows(), aligned.cols(), 1)
                && view.dtype() == finetuned[0].dtype()
        });
    let (address, length) = output;
    if !fits
        || address == 0
        || length != finetuned.iter().map(safelora_fast_core::checkpoint::View::nbytes).sum::<usize>()
    {
        return Err(PyValueError::new_err(format!("module {}: views or output do not fit the job", job.name())));
    }
    let vectors = vectors.map(|(address, count)| {
        let orthogonal = matches!(operator, core::Operator::Orthogonal(_)) && !cosine;
        if !orthogonal || address == 0 || !address.is_multiple_of(4) || count > job.shape().0 {
            return Err(PyValueError::new_err(format!("module {}: vectors do not fit", job.name())));
        }
        // SAFETY: Python owns this memory during the call, (count, m) f32 values (documented in the stub).
        let values: &[f32] =
            unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), count * job.shape().0) };
        Ok(values.to_vec())
    });
    let vectors = vectors.transpose()?;
    let raised = Mutex::new(None);
    #[allow(clippy::redundant_closure_for_method_calls, reason = "the method is not general over the token's lifetime")]
    let interrupted = || match Python::attach(|py| py.check_signals()) {
        Ok(()) => false,
        Err(error) => raised.lock().map(|mut raised| *raised = Some(error)).is_ok(),
    };
    let result = py.detach(|| {
        // SAFETY: Python owns this memory during the call and does not touch it (documented in the stub).
        let target = unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(address), length) };
        let mut engine = engines::take(threads, level)?;
        let found = core::project_update(&mut engine, job, &finetuned, operator, vectors, cosine, target, &interrupted);
        engines::keep(engine);
        found.map_err(|error| projection_error(&error))
    });
    if let Ok(Some(error)) = raised.into_inner() {
        return Err(error);
    }
    let found = result?;
    if let Some(overflow) = found.overflow {
        let view = &finetuned[0];
        return Err(CheckpointError::new_err(format!(
            "{}: tensor {:?}, once projected, holds {:.4e} at row {}, column {}, beyond the range of {:?}; store the \
             model in bfloat16 or float32",
            view.file().path().display(),
            view.tensor(),
            overflow.value,
            overflow.row,
            overflow.col,
            view.dtype(),
        )));
    }
    let core::UpdateOutcome { v_norm, rank, energy, cosine, update_norm, update_norm_projected, .. } = found;
    Ok(UpdateOutcome { v_norm, rank, energy, cosine, update_norm, update_norm_projected })
}
