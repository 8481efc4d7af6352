//! The package's exceptions, and the conversion of core errors to them.

use pyo3::PyErr;
use pyo3::exceptions::PyRuntimeError;
use safelora_fast_core::checkpoint;
use safelora_fast_core::projection::{JobError, ProjectionError};

pyo3::import_exception!(safelora_fast.errors, AdapterError);
pyo3::import_exception!(safelora_fast.errors, BackendError);
pyo3::import_exception!(safelora_fast.errors, CheckpointError);
pyo3::import_exception!(safelora_fast.errors, PairingError);
pyo3::import_exception!(safelora_fast.errors, SettingsError);

/// Makes a `CheckpointError` with the core's message.
pub(crate) fn checkpoint_error(error: &checkpoint::CheckpointError) -> PyErr {
    CheckpointError::new_err(error.to_string())
}

/// Makes an `AdapterError` if LoRA factors do not fit together, else a `PairingError`.
pub(crate) fn job_error(error: &JobError) -> PyErr {
    match error {
        JobError::Ranks { .. } => AdapterError::new_err(error.to_string()),
        _ => PairingError::new_err(error.to_string()),
    }
}

/// Makes the exception for a module that could not be projected.
pub(crate) fn projection_error(error: &ProjectionError) -> PyErr {
    let message = error.to_string();
    match error {
        ProjectionError::Checkpoint(_) | ProjectionError::OutOfRange(_) => CheckpointError::new_err(message),
        ProjectionError::Shape { .. } => PairingError::new_err(message),
        ProjectionError::Cancelled | ProjectionError::Internal { .. } => PyRuntimeError::new_err(message),
    }
}
