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
    /// Products of finite weights are not finite.
    #[error(
        "module {0}: the products with V leave the range of float32; the weights are damaged or not on their usual scale"
    )]
    OutOfRange(String),
    /// Shapes do not fit together.
    #[error("module {module}: {source}")]
    Shape {
        /// Name of the module.
        module: String,
        /// The shape error.
        source: ShapeError,
    },
    /// The run was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// A bug in this program.
    #[error("module {module}: internal error: {message}; please report it")]
    Internal {
        /// Name of the module.
        module: String,
        /// What happened.
        message: String,
    },
}

impl ProjectionError {
    /// Returns [`ProjectionError::Cancelled`] if the run was cancelled.
    pub(super) fn if_cancelled(cancel: &AtomicBool) -> Result<(), Self> {
        if cancel.load(Ordering::Relaxed) { Err(Self::Cancelled) } else { Ok(()) }
    }
}
