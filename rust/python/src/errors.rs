//! The package's exceptions, and how errors of the core become them.

use pyo3::PyErr;
use pyo3::exceptions::PyRuntimeError;
use safelora_fast_core::checkpoint;
use safelora_fast_core::projection::{JobError, ProjectionError};

pyo3::import_exception!(safelora_fast.errors, AdapterError);
pyo3::import_exception!(safelora_fast.errors, BackendError);
pyo3::import_exception!(safelora_fast.errors, CheckpointError);
pyo3::import_exception!(safelora_fast.errors, PairingError);
pyo3::import_exception!(safelora_fast.errors, SettingsError);

/// A `CheckpointError` with the message of the core.
pub(crate) fn checkpoint_error(error: &checkpoint::CheckpointError) -> PyErr {
    CheckpointError::new_err(error.to_string())
}

/// A `PairingError` or `AdapterError`, by which side does not fit.
pub(crate) fn job_error(error: &JobError) -> PyErr {
    match error {
        JobError::Weights(message) => PairingError::new_err(message.clone()),
        JobError::Factors(message) => AdapterError::new_err(message.clone()),
    }
}

/// The exception for a module that could not be projected.
pub(crate) fn projection_error(error: &ProjectionError) -> PyErr {
    let message = error.to_string();
    match error {
        ProjectionError::Checkpoint(_) | ProjectionError::OutOfRange(_) => CheckpointError::new_err(message),
        ProjectionError::Shape { .. } => PairingError::new_err(message),
        ProjectionError::Cancelled | ProjectionError::Internal { .. } => PyRuntimeError::new_err(message),
    }
}
