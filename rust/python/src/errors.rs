//! The package's exceptions, and how errors of the core become them.

use pyo3::PyErr;
use safelora_fast_core::checkpoint;

pyo3::import_exception!(safelora_fast.errors, AdapterError);
pyo3::import_exception!(safelora_fast.errors, CheckpointError);
pyo3::import_exception!(safelora_fast.errors, PairingError);
pyo3::import_exception!(safelora_fast.errors, SettingsError);

/// A `CheckpointError` with the message of the core.
pub(crate) fn checkpoint_error(error: &checkpoint::CheckpointError) -> PyErr {
    CheckpointError::new_err(error.to_string())
}
