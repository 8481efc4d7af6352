//! The Python module `safelora_fast._core`.

mod checkpoint;
mod cuda;
mod cuda_plan;
mod engines;
mod environment;
mod errors;
mod feature_distance;
mod job;
mod limits;
mod operation;
mod operator;
mod settings;
mod stream;
mod update;

use pyo3::prelude::*;

/// Rust host layer of safelora-fast.
#[pymodule]
mod _core {
    use super::{Bound, PyModule, PyResult};
    use pyo3::types::PyModuleMethods;

    #[pymodule_export]
    use crate::checkpoint::{SafetensorsFile, View, copy_views, read_index};
    #[pymodule_export]
    use crate::cuda::{Cuda, cuda_kernels};
    #[pymodule_export]
    use crate::cuda_plan::CudaPlan;
    #[pymodule_export]
    use crate::environment::{cpu_features, default_threads, kernel_level};
    #[pymodule_export]
    use crate::feature_distance::{feature_distance, feature_distance_gradient};
    #[pymodule_export]
    use crate::job::{Factors, Job, Part};
    #[pymodule_export]
    use crate::limits::{fma_peak, read_seconds, update_seconds};
    #[pymodule_export]
    use crate::operation::subspace_projection;
    #[pymodule_export]
    use crate::operator::Operator;
    #[pymodule_export]
    use crate::stream::{FactorOutcome, JobOutcome, ProjectionStream};
    #[pymodule_export]
    use crate::update::{UpdateOutcome, project_update};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
