//! How the work of a grouped launch is cut.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use safelora_fast_cuda::Dtype;
use safelora_fast_cuda::subspace_projection::{Form, Kind, Operand, Plan};

/// ((aligned, stride), (base, stride), (rows, cols), factor, rank).
type Spec = ((usize, usize), (usize, usize), (usize, usize), usize, usize);

/// Products of many matrices with thin factors, as blocks of a launch.
#[pyclass(frozen, module = "safelora_fast._core")]
pub(crate) struct CudaPlan {
    pub(crate) plan: Plan,
}

#[pymethods]
impl CudaPlan {
    #[new]
    #[pyo3(signature = (operands, *, form, dtype, is_pair))]
    #[allow(clippy::needless_pass_by_value, reason = "arguments are extracted by value")]
    fn new(operands: Vec<Spec>, form: &str, dtype: &str, is_pair: bool) -> PyResult<Self> {
        let form = match form {
            "transposed" => Form::Transposed,
            "straight" => Form::Straight,
            _ => {
                return Err(PyValueError::new_err(format!("form is {form:?}; use \"transposed\" or \"straight\"")));
            }
        };
        let dtype: Dtype = dtype.parse().map_err(value_error)?;
        let operands: Vec<Operand> = operands
            .into_iter()
            .map(|((aligned, aligned_stride), (base, base_stride), shape, factor, rank)| Operand {
                aligned,
                base,
                aligned_stride,
                base_stride,
                shape,
                factor,
                rank,
            })
            .collect();
        let plan = Plan::new(Kind { form, dtype, is_pair }, &operands).map_err(value_error)?;
        Ok(Self { plan })
    }

    #[getter]
    fn table<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.plan.table())
    }

    #[getter]
    fn offsets(&self) -> Vec<usize> {
        self.plan.offsets()
    }

    #[getter]
    fn results(&self) -> usize {
        self.plan.results()
    }

    #[getter]
    fn partial(&self) -> usize {
        self.plan.partial()
    }

    #[getter]
    fn partial_squares(&self) -> usize {
        self.plan.partial_squares()
    }
}

#[allow(clippy::needless_pass_by_value, reason = "the shape of map_err")]
fn value_error(error: safelora_fast_cuda::CudaError) -> PyErr {
    PyValueError::new_err(error.to_string())
}
