//! Kernels on NVIDIA GPUs, for tensors that Python keeps alive.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use safelora_fast_cuda::feature_distance::{Normalize, Packing, Pair, Results, Tokens};
use safelora_fast_cuda::subspace_projection::{Form, Memory, Plans, Request};
use safelora_fast_cuda::{Cache, CudaError, Dtype, Nvrtc, Source};

use crate::cuda_plan::{CudaPlan, modules};
use crate::errors::BackendError;

/// (address, dtype, (batch, tokens, hidden), (`batch_stride`, `token_stride`)).
type Spec = (usize, String, (usize, usize, usize), (usize, usize));

/// The CUDA driver, and kernels that are compiled at first use and kept for each device until the process ends.
#[pyclass(frozen, module = "safelora_fast._core")]
pub(crate) struct Cuda {
    cuda: safelora_fast_cuda::Cuda,
    plans: Mutex<Plans<Py<CudaPlan>>>,
}

#[pymethods]
impl Cuda {
    #[new]
    #[pyo3(signature = (*, driver, nvrtc, cache=None))]
    #[allow(clippy::needless_pass_by_value, reason = "arguments are extracted by value")]
    fn new(py: Python<'_>, driver: Vec<String>, nvrtc: Vec<String>, cache: Option<PathBuf>) -> PyResult<Self> {
        let cuda = py.detach(|| safelora_fast_cuda::Cuda::open(&driver, nvrtc, cache));
        Ok(Self { cuda: cuda.map_err(|error| backend_error(&error))?, plans: Mutex::default() })
    }

    #[getter]
    fn driver_version(&self) -> PyResult<i32> {
        self.cuda.driver_version().map_err(|error| backend_error(&error))
    }

    #[getter]
    fn device_count(&self) -> PyResult<i32> {
        self.cuda.device_count().map_err(|error| backend_error(&error))
    }

    fn capability(&self, py: Python<'_>, device: i32) -> PyResult<(i32, i32)> {
        py.detach(|| self.cuda.capability(device)).map_err(|error| backend_error(&error))
    }

    fn prepare(&self, py: Python<'_>, device: i32, source: &str) -> PyResult<()> {
        let source = find(source)?;
        py.detach(|| self.cuda.prepare(device, source)).map_err(|error| backend_error(&error))
    }

    #[pyo3(signature = (place, features, reference, mask, packing, results, *, normalize="sequence"))]
    #[allow(clippy::too_many_arguments, reason = "the arguments of Python")]
    #[allow(clippy::needless_pass_by_value, reason = "arguments are extracted by value")]
    fn feature_distance(
        &self,
        py: Python<'_>,
        place: (i32, usize),
        features: Vec<Spec>,
        reference: Vec<Spec>,
        mask: (usize, (usize, usize)),
        packing: Option<(usize, usize, usize)>,
        results: (usize, usize, usize, usize, usize, usize),
        normalize: &str,
    ) -> PyResult<()> {
        let normalize = match normalize {
            "sequence" => Normalize::Sequence,
            "token" => Normalize::Token,
            "none" => Normalize::None,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "normalize is {normalize:?}; use \"sequence\", \"token\" or \"none\""
                )));
            }
        };
        let (pairs, shape) = pairs(&features, &reference)?;
        let (mask, (mask_row, mask_token)) = mask;
        let packing = packing.map(|(order, starts, counts)| Packing { order, starts, counts });
        let tokens = Tokens { shape, mask, mask_strides: [mask_row, mask_token], packing };
        let (sums, factors, distances, sequences, share, distance) = results;
        let results = Results { sums, factors, distances, sequences, share, distance };
        let (device, stream) = place;
        // SAFETY: by the stub's contract this is memory of the device that lives until the stream has run the launch.
        let launched =
            py.detach(|| unsafe { self.cuda.feature_distance(device, stream, &pairs, tokens, normalize, results) });
        launched.map_err(|error| backend_error(&error))
    }

    #[allow(clippy::too_many_arguments, reason = "the arguments of Python")]
    #[allow(clippy::needless_pass_by_value, reason = "arguments are extracted by value")]
    fn feature_distance_gradient(
        &self,
        py: Python<'_>,
        place: (i32, usize),
        features: Vec<Spec>,
        reference: Vec<Spec>,
        outputs: Vec<usize>,
        factors: usize,
        weight: usize,
    ) -> PyResult<()> {
        let (pairs, shape) = pairs(&features, &reference)?;
        let (device, stream) = place;
        let launched = py.detach(|| {
            let cuda = &self.cuda;
            // SAFETY: by the stub's contract this is memory of the device that lives until the stream has run it.
            unsafe { cuda.feature_distance_gradient(device, stream, &pairs, &outputs, shape, factors, weight) }
        });
        launched.map_err(|error| backend_error(&error))
    }

    #[pyo3(signature = (place, matrices, factors, dtypes, *, transposed, captured, results=None))]
    #[allow(clippy::too_many_arguments, reason = "the token and the arguments of Python")]
    #[allow(clippy::needless_pass_by_value, reason = "arguments are extracted by value")]
    fn plan(
        &self,
        py: Python<'_>,
        place: (i32, usize),
        matrices: Bound<'_, PyAny>,
        factors: Bound<'_, PyAny>,
        dtypes: Bound<'_, PyDict>,
        transposed: bool,
        captured: bool,
        results: Option<Vec<usize>>,
    ) -> PyResult<Option<Py<CudaPlan>>> {
        let names = dtypes.iter().map(|(dtype, name)| Ok((dtype, parse(&name.extract::<String>()?)?)));
        let form = if transposed { Form::Transposed } else { Form::Straight };
        let names = names.collect::<PyResult<Vec<_>>>()?;
        let Some(modules) = modules(&matrices, &factors, results.as_deref(), &names, form)? else {
            return Ok(None);
        };
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = plans
            .find(Request { place, modules }, captured, |request| Py::new(py, CudaPlan::new(&request.modules)?))?;
        Ok(Some(plan.clone_ref(py)))
    }

    #[getter]
    fn plans(&self) -> [usize; 2] {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner).counts()
    }

    fn products(
        &self,
        py: Python<'_>,
        place: (i32, usize),
        plan: &CudaPlan,
        memory: (usize, usize, usize, usize, usize),
    ) -> PyResult<()> {
        let (device, stream) = place;
        let (table, results, partial, partial_squares, squares) = memory;
        let memory = Memory { table, results, partial, partial_squares, squares };
        // SAFETY: by the stub's contract this is memory of the device that lives until the stream has run the launch.
        let launched = py.detach(|| unsafe { self.cuda.products(device, stream, &plan.plan, memory) });
        launched.map_err(|error| backend_error(&error))
    }
}

/// Return the machine code of a source file for an architecture (`sm_90`); needs no GPU.
#[pyfunction]
#[pyo3(signature = (source, architecture, *, nvrtc, cache=None))]
#[allow(clippy::needless_pass_by_value, reason = "arguments are extracted by value")]
pub(crate) fn cuda_kernels<'py>(
    py: Python<'py>,
    source: &str,
    architecture: &str,
    nvrtc: Vec<String>,
    cache: Option<PathBuf>,
) -> PyResult<Bound<'py, PyBytes>> {
    let source = find(source)?;
    let cubin = py.detach(|| Cache::new(cache).cubin(&Nvrtc::open(&nvrtc)?, source, architecture));
    Ok(PyBytes::new(py, &cubin.map_err(|error| backend_error(&error))?))
}

fn find(name: &str) -> PyResult<Source> {
    let found = Source::ALL.into_iter().find(|source| source.name() == name);
    found.ok_or_else(|| PyValueError::new_err(format!("there is no file of kernels {name:?}")))
}

fn parse(dtype: &str) -> PyResult<Dtype> {
    dtype.parse().map_err(|error: CudaError| PyValueError::new_err(error.to_string()))
}

/// Returns the layers, each checked against its reference, and the batch and token counts that they share.
fn pairs(features: &[Spec], reference: &[Spec]) -> PyResult<(Vec<Pair>, [usize; 2])> {
    let Some((_, _, (batch, tokens, _), _)) = features.first() else {
        return Err(PyValueError::new_err("there is no block of features"));
    };
    if features.len() != reference.len() {
        return Err(PyValueError::new_err(format!(
            "{} blocks of features and {} of reference features",
            features.len(),
            reference.len()
        )));
    }
    let mut pairs = Vec::with_capacity(features.len());
    for (features, reference) in features.iter().zip(reference) {
        let ((address, dtype, shape, strides), (reference, dtype_of_reference, shape_of_reference, others)) =
            (features, reference);
        if (dtype, shape) != (dtype_of_reference, shape_of_reference) || (shape.0, shape.1) != (*batch, *tokens) {
            return Err(PyValueError::new_err(format!(
                "features are {shape:?} {dtype} but the reference is {shape_of_reference:?} {dtype_of_reference}, of {batch} x \
                 {tokens} tokens"
            )));
        }
        pairs.push(Pair {
            dtype: parse(dtype)?,
            hidden: shape.2,
            features: *address,
            reference: *reference,
            features_strides: [strides.0, strides.1],
            reference_strides: [others.0, others.1],
        });
    }
    Ok((pairs, [*batch, *tokens]))
}

/// Makes a `BackendError`, or a `ValueError` for operands that do not fit.
fn backend_error(error: &CudaError) -> PyErr {
    match error {
        CudaError::Operands(message) => PyValueError::new_err(message.clone()),
        _ => BackendError::new_err(error.to_string()),
    }
}
