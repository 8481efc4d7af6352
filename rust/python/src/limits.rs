//! What the machine can read and multiply, for benchmarks.

use pyo3::prelude::*;
use safelora_fast_core::kernels::Level;
use safelora_fast_core::limits;

/// Seconds to read every byte of the regions (address, length) once with `threads` threads. The caller keeps them alive.
#[pyfunction]
pub(crate) fn read_seconds(py: Python<'_>, regions: Vec<(usize, usize)>, threads: usize) -> f64 {
    // SAFETY: passed on to the caller.
    py.detach(|| limits::read_seconds(&unsafe { slices(regions) }, threads))
}

/// Seconds to read every byte of the regions and to overwrite every byte of another one, past the caches with `stream`. The
/// caller keeps them alive, and has no use for what the last one holds.
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
        // SAFETY: the caller vouches that the bytes are its own to write, and for the regions.
        unsafe {
            let written = std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(address), length);
            limits::update_seconds(&slices(regions), written, threads, stream)
        }
    })
}

/// # Safety
/// `length` bytes stay readable at each `address` as long as the slices are used.
unsafe fn slices<'a>(regions: Vec<(usize, usize)>) -> Vec<&'a [u8]> {
    let slice = |(address, length)| {
        // SAFETY: the caller vouches for the memory.
        unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), length) }
    };
    regions.into_iter().map(slice).collect()
}

/// Fused multiply-add rate of `threads` threads on registers alone, in FLOP/s, at the widest level.
#[pyfunction]
pub(crate) fn fma_peak(py: Python<'_>, threads: usize) -> f64 {
    py.detach(|| limits::fma_peak(threads, Level::detect()))
}
