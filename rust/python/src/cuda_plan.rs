//! Plans of grouped products, made from torch tensors and kept with their tables on the device.

use std::sync::OnceLock;

use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};
use safelora_fast_cuda::Dtype;
use safelora_fast_cuda::subspace_projection::{Form, Kind, Operand, Plan};

/// Alignment of a factor's address in bytes.
const ALIGNMENT: usize = 16;

/// How products of many matrices V with thin factors X are divided into blocks of launches.
#[pyclass(frozen, module = "safelora_fast._core")]
pub(crate) struct CudaPlan {
    pub(crate) plan: Plan,
    /// Rows and columns of each result.
    shapes: Vec<(usize, usize)>,
    memory: OnceLock<Py<PyAny>>,
}

impl CudaPlan {
    pub(crate) fn new(modules: &[(Kind, Operand)]) -> PyResult<Self> {
        let plan = Plan::new(modules).map_err(|error| PyValueError::new_err(error.to_string()))?;
        let shapes = modules.iter().map(|(kind, operand)| {
            let (rows, columns) = operand.shape;
            (if kind.form == Form::Transposed { columns } else { rows }, operand.rank)
        });
        Ok(Self { plan, shapes: shapes.collect(), memory: OnceLock::new() })
    }
}

#[pymethods]
impl CudaPlan {
    #[getter]
    fn table<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.plan.table())
    }

    #[getter]
    fn places(&self) -> Vec<(usize, usize, (usize, usize))> {
        self.plan.places().iter().zip(&self.shapes).map(|((start, square), shape)| (*start, *square, *shape)).collect()
    }

    #[getter]
    fn sizes(&self) -> (usize, usize, usize) {
        (self.plan.results(), self.plan.partial(), self.plan.partial_squares())
    }

    #[getter]
    fn memory(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.memory.get().map(|memory| memory.clone_ref(py))
    }

    fn keep(&self, memory: Py<PyAny>) {
        // If another thread was first, it uploaded the same table.
        let _ = self.memory.set(memory);
    }
}

/// The properties of a torch tensor that a plan needs.
#[derive(Clone, Copy)]
struct Tensor {
    address: usize,
    dtype: Option<Dtype>,
    shape: (usize, usize),
    strides: (usize, usize),
}

impl Tensor {
    fn read(tensor: &Bound<'_, PyAny>, dtypes: &[(Bound<'_, PyAny>, Dtype)]) -> PyResult<Self> {
        let py = tensor.py();
        let dtype = tensor.getattr(intern!(py, "dtype"))?;
        Ok(Self {
            address: tensor.call_method0(intern!(py, "data_ptr"))?.extract()?,
            dtype: dtypes.iter().find(|(known, _)| known.is(&dtype)).map(|(_, dtype)| *dtype),
            shape: tensor.getattr(intern!(py, "shape"))?.extract()?,
            strides: tensor.call_method0(intern!(py, "stride"))?.extract()?,
        })
    }

    const fn turned(self) -> Self {
        let ((rows, columns), (row, column)) = (self.shape, self.strides);
        Self { shape: (columns, rows), strides: (column, row), ..self }
    }

    const fn has_contiguous_rows(&self) -> bool {
        (self.strides.1 == 1 || self.shape.1 == 1) && self.strides.0 >= self.shape.1
    }

    fn is_factor(&self) -> bool {
        let (rows, columns) = self.shape;
        let is_contiguous = (self.strides.1 == 1 || columns == 1) && (self.strides.0 == columns || rows == 1);
        self.dtype == Some(Dtype::F32) && is_contiguous && self.address.is_multiple_of(ALIGNMENT)
    }
}

/// Returns the modules as kernel operands, or `None` if a tensor must be copied first. A matrix with contiguous columns
/// is read as its transpose.
pub(crate) fn modules(
    matrices: &Bound<'_, PyAny>,
    factors: &Bound<'_, PyAny>,
    results: Option<&[usize]>,
    dtypes: &[(Bound<'_, PyAny>, Dtype)],
    form: Form,
) -> PyResult<Option<Vec<(Kind, Operand)>>> {
    let mut found = Vec::with_capacity(matrices.len()?);
    for (index, (matrix, factor)) in matrices.try_iter()?.zip(factors.try_iter()?).enumerate() {
        let (matrix, factor) = (matrix?, Tensor::read(&factor?, dtypes)?);
        let (first, second) = match matrix.cast::<PyTuple>() {
            Ok(pair) => (Tensor::read(&pair.get_item(0)?, dtypes)?, Some(Tensor::read(&pair.get_item(1)?, dtypes)?)),
            Err(_) => (Tensor::read(&matrix, dtypes)?, None),
        };
        let Some((kind, operand)) = module(first, second, &factor, form) else { return Ok(None) };
        let result = results.and_then(|results| results.get(index)).copied().unwrap_or(0);
        found.push((kind, Operand { result, ..operand }));
    }
    Ok(Some(found))
}

fn module(first: Tensor, second: Option<Tensor>, factor: &Tensor, form: Form) -> Option<(Kind, Operand)> {
    let other = second.unwrap_or(first);
    let dtype = first.dtype.filter(|dtype| other.dtype == Some(*dtype))?;
    let (first, other, form) = if first.has_contiguous_rows() && other.has_contiguous_rows() {
        (first, other, form)
    } else {
        let turned = if form == Form::Transposed { Form::Straight } else { Form::Transposed };
        (first.turned(), other.turned(), turned)
    };
    if !(first.has_contiguous_rows() && other.has_contiguous_rows() && factor.is_factor()) {
        return None;
    }
    let kind = Kind { form, dtype, is_pair: second.is_some() };
    let operand = Operand {
        aligned: first.address,
        base: other.address,
        aligned_stride: first.strides.0,
        base_stride: other.strides.0,
        shape: first.shape,
        factor: factor.address,
        rank: factor.shape.1,
        result: 0,
    };
    Some((kind, operand))
}
