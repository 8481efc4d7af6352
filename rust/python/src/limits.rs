//! The machine's read bandwidth and multiply-add rate, for benchmarks.

use pyo3::prelude::*;
use safelora_fast_core::kernels::Level;
use safelora_fast_core::limits;

/// Return the seconds to read every byte of the regions (address, length) once with `threads` threads.
#[pyfunction]
pub(crate) fn read_seconds(py: Python<'_>, regions: Vec<(usize, usize)>, threads: usize) -> f64 {
    // SAFETY: by the stub's contract the memory stays alive.
    py.detach(|| limits::read_seconds(&unsafe { slices(regions) }, threads))
}

/// Return the seconds to read the regions and overwrite `written`; `stream` bypasses the caches.
#[pyfunction]
#[pyo3(signature = (regions, written, threads, *, stream=false))]
pub(crate) fn update_seconds(
    py: Python<'_>,
    regions: Vec<(usize, usize)>,
    written: (usize, usize),
    threads: usize,
    stream: bool,
) -> f64 {
    py.detach(|| {
        let (address, length) = written;
        // SAFETY: by the stub's contract the memory stays alive, and the content of `written` may be lost.
        unsafe {
            let written = std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(address), length);
            limits::update_seconds(&slices(regions), written, threads, stream)
        }
    })
}

/// # Safety
/// `length` bytes stay readable at each `address` while the slices are used.
unsafe fn slices<'a>(regions: Vec<(usize, usize)>) -> Vec<&'a [u8]> {
    let slice = |(address, length)| {
        // SAFETY: by the contract of this function.
        unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), length) }
    };
    regions.into_iter().map(slice).collect()
}

/// Return the fused multiply-add rate of `threads` threads in registers, in FLOP/s, at the widest level.
#[pyfunction]
pub(crate) fn fma_peak(py: Python<'_>, threads: usize) -> f64 {
    py.detach(|| limits::fma_peak(threads, Level::detect()))
}
