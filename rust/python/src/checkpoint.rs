//! Safetensors files, indices and views of their tensors.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};
use safelora_fast_core::checkpoint as core;

use crate::errors::checkpoint_error;
use crate::settings;

/// A memory-mapped safetensors file whose header has been checked against the file.
#[pyclass(frozen, module = "safelora_fast._core")]
pub(crate) struct SafetensorsFile {
    inner: Arc<core::SafetensorsFile>,
}

#[pymethods]
impl SafetensorsFile {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let opened = py.detach(|| core::SafetensorsFile::open(path));
        let inner = Arc::new(opened.map_err(|error| checkpoint_error(&error))?);
        Ok(Self { inner })
    }

    #[getter]
    fn path(&self) -> OsString {
        self.inner.path().into()
    }

    #[getter]
    fn size(&self) -> usize {
        self.inner.size()
    }

    #[getter]
    fn data_start(&self) -> usize {
        self.inner.data_start()
    }

    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.inner.metadata().into_pyobject(py)
    }

    #[getter]
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let tensors = PyDict::new(py);
        for (name, entry) in self.inner.tensors() {
            let shape = PyTuple::new(py, &entry.shape)?;
            tensors.set_item(name, (entry.dtype.to_string(), shape, entry.begin, entry.end))?;
        }
        Ok(tensors)
    }

    fn read<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = self.inner.read(name).map_err(|error| checkpoint_error(&error))?;
        Ok(PyBytes::new(py, bytes))
    }

    fn __repr__(&self) -> String {
        format!(
            "SafetensorsFile(\"{}\", {} tensors, {} bytes)",
            self.inner.path().display(),
            self.inner.tensors().len(),
            self.inner.size()
        )
    }
}

/// Read `weight_map` of a `*.safetensors.index.json`: tensor name -> absolute path of its shard.
#[pyfunction]
#[allow(clippy::needless_pass_by_value, reason = "arguments are extracted by value")]
pub(crate) fn read_index(py: Python<'_>, path: PathBuf) -> PyResult<Bound<'_, PyDict>> {
    let located = py.detach(|| core::read_index(&path)).map_err(|error| checkpoint_error(&error))?;
    let index = PyDict::new(py);
    for (tensor, shard) in located {
        index.set_item(tensor, shard.into_os_string())?;
    }
    Ok(index)
}

/// A strided matrix inside a tensor of a file.
#[pyclass(frozen, module = "safelora_fast._core")]
pub(crate) struct View {
    pub(crate) inner: core::View,
}

#[pymethods]
impl View {
    #[new]
    #[pyo3(signature = (file, tensor, *, offset=0, rows, cols, row_stride, col_stride=1))]
    fn new(
        file: &SafetensorsFile,
        tensor: &str,
        offset: usize,
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> PyResult<Self> {
        let layout = core::Layout { offset, rows, cols, row_stride, col_stride };
        let inner =
            core::View::new(Arc::clone(&file.inner), tensor, layout).map_err(|error| checkpoint_error(&error))?;
        Ok(Self { inner })
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.inner.nbytes()
    }

    fn __repr__(&self) -> String {
        format!(
            "View({:?}, {}x{}, {:?})",
            self.inner.tensor(),
            self.inner.rows(),
            self.inner.cols(),
            self.inner.dtype()
        )
    }
}

/// Copy the stored bytes of each view, from first element to last, to (address, length), with several threads.
#[pyfunction]
#[pyo3(signature = (views, targets, *, threads=None))]
#[allow(clippy::needless_pass_by_value, reason = "arguments are extracted by value")]
pub(crate) fn copy_views(
    py: Python<'_>,
    views: Vec<PyRef<'_, View>>,
    targets: Vec<(usize, usize)>,
    threads: Option<usize>,
) -> PyResult<()> {
    let threads = settings::threads(threads)?;
    let views: Vec<_> = views.iter().map(|view| view.inner.clone()).collect();
    if views.len() != targets.len() {
        return Err(PyValueError::new_err(format!("{} views but {} targets", views.len(), targets.len())));
    }
    for (view, (address, length)) in views.iter().zip(&targets) {
        if *address == 0 || *length != view.bytes().len() {
            return Err(PyValueError::new_err(format!(
                "a target of {length} bytes at {address:#x} for tensor {:?}, whose view has {}",
                view.tensor(),
                view.bytes().len()
            )));
        }
    }
    let mut ordered = targets.clone();
    ordered.sort_unstable();
    if ordered.windows(2).any(|pair| pair[0].0.checked_add(pair[0].1).is_none_or(|end| end > pair[1].0)) {
        return Err(PyValueError::new_err("two targets share memory"));
    }
    py.detach(|| {
        let pairs = views.iter().zip(targets).map(|(view, (address, length))| {
            // SAFETY: Python owns this memory during the call (documented in the stub); no two targets overlap.
            let target =
                unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(address), length) };
            (view, target)
        });
        core::copy(pairs.collect(), threads);
    });
    Ok(())
}
