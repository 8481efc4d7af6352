//! What the machine can read and multiply, for benchmarks.

use pyo3::prelude::*;
use safelora_fast_core::kernels::Level;
use safelora_fast_core::limits;

/// Seconds to read every byte of the regions (address, length) once with `threads` threads. The caller keeps them alive.
#[pyfunction]
pub(crate) fn read_seconds(py: Python<'_>, regions: Vec<(usize, usize)>, threads: usize) -> f64 {
    py.detach(|| {
        let slices: Vec<&[u8]> = regions
            .into_iter()
            .map(|(address, length)| {
                // SAFETY: the caller vouches that `length` bytes stay readable at `address` during the call.
                unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), length) }
            })
            .collect();
        limits::read_seconds(&slices, threads)
    })
}

/// Fused multiply-add rate of `threads` threads on registers alone, in FLOP/s, at the widest level.
#[pyfunction]
pub(crate) fn fma_peak(py: Python<'_>, threads: usize) -> f64 {
    py.detach(|| limits::fma_peak(threads, Level::detect()))
}
