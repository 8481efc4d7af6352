//! Why a module could not be projected.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::checkpoint::CheckpointError;
use crate::kernels::ShapeError;

/// Why a module could not be projected.
#[derive(Debug, thiserror::Error)]
pub enum ProjectionError {
    /// A weight or factor is NaN or infinite.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Finite weights whose products are not.
    #[error(
        "module {0}: the products with V leave the range of float32; the weights are damaged or not on their usual scale"
    )]
    OutOfRange(String),
    /// Shapes that do not fit each other.
    #[error("module {module}: {source}")]
    Shape {
        /// Name of the module.
        module: String,
        /// What does not fit.
        source: ShapeError,
    },
    /// The run was asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// A defect of this program.
    #[error("module {module}: internal error: {message}; please report it")]
    Internal {
        /// Name of the module.
        module: String,
        /// What happened.
        message: String,
    },
}

impl ProjectionError {
    /// [`ProjectionError::Cancelled`] once the run has been asked to stop.
    pub(super) fn if_cancelled(cancel: &AtomicBool) -> Result<(), Self> {
        if cancel.load(Ordering::Relaxed) { Err(Self::Cancelled) } else { Ok(()) }
    }
}
