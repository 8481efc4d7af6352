//! Lines of JSONL in memory that Python keeps alive.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use safelora_fast_core::rows;

use crate::settings;

/// Where the lines start that are not certainly rows of text or turns.
#[pyfunction]
#[pyo3(signature = (content, size, *, threads=None))]
pub(crate) fn odd_rows(py: Python<'_>, content: usize, size: usize, threads: Option<usize>) -> PyResult<Vec<usize>> {
    let threads = settings::threads(threads)?;
    if size == 0 {
        return Ok(Vec::new());
    }
    if content == 0 || isize::try_from(size).is_err() || content.checked_add(size).is_none() {
        return Err(PyValueError::new_err(format!("content: no memory of {size} bytes at {content:#x}")));
    }
    // SAFETY: the caller promises that this memory lives and that nobody writes it; the range was checked.
    let content = unsafe { std::slice::from_raw_parts(content as *const u8, size) };
    Ok(py.detach(|| rows::odd_rows(content, threads)))
}
