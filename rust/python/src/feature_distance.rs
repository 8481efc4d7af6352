//! The feature distance on hidden states in memory that Python keeps alive.

use std::ops::Range;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use safelora_fast_core::feature_distance::{self as core, Factor, Gradient, Normalize, Pair, Sequences, States};
use safelora_fast_core::kernels::ShapeError;

use crate::{engines, settings};

/// (address, dtype, (batch, tokens, hidden), (`batch_stride`, `token_stride`)).
type Spec = (usize, String, (usize, usize, usize), (usize, usize));
/// (address, (`batch_stride`, `token_stride`)).
type PerToken = (usize, (usize, usize));

/// Sum over layers, mean over sequences, of the squared distance of (unit) hidden states in memory. Fills `factors` for
/// the gradient.
#[pyfunction]
#[pyo3(signature = (features, reference, mask, segments, factors, *, normalize="sequence", threads=None))]
#[allow(clippy::too_many_arguments, reason = "the token and the keyword arguments of Python")]
#[allow(clippy::needless_pass_by_value, reason = "arguments are extracted by value")]
pub(crate) fn feature_distance(
    py: Python<'_>,
    features: Vec<Spec>,
    reference: Vec<Spec>,
    mask: PerToken,
    segments: Option<PerToken>,
    factors: usize,
    normalize: &str,
    threads: Option<usize>,
) -> PyResult<f64> {
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
    let (threads, level) = (settings::threads(threads)?, settings::level()?);
    let blocks = pairs(&features, &reference)?;
    let Some([batch, tokens, _]) = blocks.first().map(Pair::shape) else {
        return Err(PyValueError::new_err("there is no block of features"));
    };
    let mask = Elements::<u8>::new("mask", mask, [batch, tokens])?;
    let segments = segments.map(|spec| Elements::<i64>::new("segments", spec, [batch, tokens])).transpose()?;
    let size = blocks.len().checked_mul(batch * tokens).and_then(|count| count.checked_mul(size_of::<Factor>()));
    let range = region("factors", factors, size, align_of::<Factor>())?;
    // SAFETY: Python owns this memory during the call (documented in the stub); size and alignment were checked.
    let factors = unsafe { memory_mut::<Factor>(&range) };
    py.detach(|| {
        let sequences = Sequences::new(
            [batch, tokens],
            |row, token| mask.get(row, token) != 0,
            |row, token| segments.as_ref().map_or(0, |segments| segments.get(row, token)),
        );
        let engine = engines::take(threads, level)?;
        let distance = core::forward(&engine, &blocks, &sequences, normalize, factors);
        engines::keep(engine);
        distance.map_err(|error| value_error(&error))
    })
}

/// Write `weight` times the gradient of `feature_distance` in `features` to `outputs`, contiguous, in their dtype.
#[pyfunction]
#[pyo3(signature = (features, reference, factors, outputs, weight, *, threads=None))]
#[allow(clippy::needless_pass_by_value, reason = "arguments are extracted by value")]
pub(crate) fn feature_distance_gradient(
    py: Python<'_>,
    features: Vec<Spec>,
    reference: Vec<Spec>,
    factors: Vec<usize>,
    outputs: Vec<usize>,
    weight: f64,
    threads: Option<usize>,
) -> PyResult<()> {
    let (threads, level) = (settings::threads(threads)?, settings::level()?);
    let blocks = pairs(&features, &reference)?;
    if factors.len() != blocks.len() || outputs.len() != blocks.len() {
        return Err(PyValueError::new_err(format!(
            "{} blocks, but {} factors and {} outputs",
            blocks.len(),
            factors.len(),
            outputs.len()
        )));
    }
    let mut read = Vec::new();
    let mut written = Vec::new();
    for ((block, factors), output) in blocks.iter().zip(factors).zip(outputs) {
        read.push(region("factors", factors, block.rows().checked_mul(size_of::<Factor>()), align_of::<Factor>())?);
        written.push(region("output", output, Some(block.size()), 1)?);
    }
    let inputs = features.iter().chain(&reference).map(|spec| span("features", spec)).collect::<PyResult<Vec<_>>>()?;
    for (index, output) in written.iter().enumerate() {
        let others = inputs.iter().chain(&read).chain(&written[..index]);
        if others.into_iter().any(|other| overlap(output, other)) {
            return Err(PyValueError::new_err(format!("output {index} shares memory with another tensor")));
        }
    }
    let mut gradients: Vec<Gradient<'_>> = blocks
        .into_iter()
        .zip(read.iter().zip(&written))
        .map(|(block, (factors, output))| {
            // SAFETY: by the stub's contract this memory lives, nothing else writes the factors, and Python owns the
            // output. Sizes, alignment and overlap of the output were checked.
            unsafe { Gradient { block, factors: memory(factors), output: memory_mut(output) } }
        })
        .collect();
    py.detach(|| {
        let engine = engines::take(threads, level)?;
        let written = core::backward(&engine, &mut gradients, weight);
        engines::keep(engine);
        written.map_err(|error| value_error(&error))
    })
}

/// Returns the layers, each checked against its reference.
fn pairs<'a>(features: &[Spec], reference: &[Spec]) -> PyResult<Vec<Pair<'a>>> {
    if features.len() != reference.len() {
        return Err(PyValueError::new_err(format!(
            "{} blocks of features and {} of reference features",
            features.len(),
            reference.len()
        )));
    }
    features
        .iter()
        .zip(reference)
        .map(|(features, reference)| {
            let pair = Pair::new(states("features", features)?, states("reference", reference)?);
            pair.map_err(|error| value_error(&error))
        })
        .collect()
}

fn states<'a>(name: &'static str, spec: &Spec) -> PyResult<States<'a>> {
    let range = span(name, spec)?;
    let (_, dtype, (batch, tokens, hidden), (batch_stride, token_stride)) = spec;
    let (shape, strides) = ([*batch, *tokens, *hidden], [*batch_stride, *token_stride]);
    // SAFETY: by the stub's contract this memory lives and stays unwritten during the call; its size was checked.
    let bytes = unsafe { memory::<u8>(&range) };
    States::new(bytes, settings::dtype(name, dtype)?, shape, strides).map_err(|error| value_error(&error))
}

/// The addresses from the first element to the last.
fn span(name: &str, (address, dtype, shape, strides): &Spec) -> PyResult<Range<usize>> {
    let dtype = settings::dtype(name, dtype)?;
    let size = States::span(dtype, [shape.0, shape.1, shape.2], [strides.0, strides.1]);
    region(name, *address, size, 1)
}

/// `size` bytes at `address`, if that is a valid range.
fn region(name: &str, address: usize, size: Option<usize>, align: usize) -> PyResult<Range<usize>> {
    let end = size.filter(|size| isize::try_from(*size).is_ok()).and_then(|size| address.checked_add(size));
    match end {
        Some(end) if end == address || (address != 0 && address.is_multiple_of(align)) => Ok(address..end),
        Some(_) => Err(PyValueError::new_err(format!("{name} cannot lie at address {address:#x}"))),
        None => Err(PyValueError::new_err(format!("{name} at address {address:#x} is larger than memory"))),
    }
}

/// # Safety
/// The memory lives, holds valid values, and is not written while the slice is used.
unsafe fn memory<'a, T>(range: &Range<usize>) -> &'a [T] {
    if range.is_empty() {
        return &[];
    }
    // SAFETY: `region` checked size and alignment; the rest is this function's contract.
    unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(range.start), range.len() / size_of::<T>()) }
}

/// # Safety
/// The memory lives, holds valid values, and nothing else accesses it while the slice is used.
unsafe fn memory_mut<'a, T>(range: &Range<usize>) -> &'a mut [T] {
    if range.is_empty() {
        return &mut [];
    }
    let pointer = std::ptr::with_exposed_provenance_mut(range.start);
    // SAFETY: `region` checked size and alignment; the rest is this function's contract.
    unsafe { std::slice::from_raw_parts_mut(pointer, range.len() / size_of::<T>()) }
}

fn overlap(one: &Range<usize>, other: &Range<usize>) -> bool {
    one.start < other.end && other.start < one.end
}

fn value_error(error: &ShapeError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// One number per token of a batch.
struct Elements<'a, T> {
    values: &'a [T],
    strides: [usize; 2],
}

impl<T: Copy> Elements<'_, T> {
    fn new(name: &str, (address, strides): PerToken, [batch, tokens]: [usize; 2]) -> PyResult<Self> {
        let strides = [strides.0, strides.1];
        let size = if batch == 0 || tokens == 0 {
            Some(0)
        } else {
            let last = (batch - 1).checked_mul(strides[0]).zip((tokens - 1).checked_mul(strides[1]));
            last.and_then(|(row, token)| row.checked_add(token)?.checked_add(1)?.checked_mul(size_of::<T>()))
        };
        let range = region(name, address, size, align_of::<T>())?;
        // SAFETY: by the stub's contract this memory lives and stays unwritten during the call. Size and alignment were
        // checked, and any bits are a valid number.
        Ok(Self { values: unsafe { memory(&range) }, strides })
    }

    fn get(&self, row: usize, token: usize) -> T {
        self.values[row * self.strides[0] + token * self.strides[1]]
    }
}
