//! LoRA factors and weights as f32, checked to be finite.

use crate::checkpoint::{CheckpointError, View};
use crate::kernels::Dtype;

/// Vectors that are converted together.
const TILE: usize = 16;
/// Elements of each vector that are converted at a time.
const BLOCK: usize = 256;

/// Elements of stored bytes, addressed by two nested loops.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    /// First element.
    pub start: usize,
    /// Count and stride of the outer loop, in elements.
    pub outer: (usize, usize),
    /// Count and stride of the inner loop, in elements.
    pub inner: (usize, usize),
}

/// An element that is NaN or infinite.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NotFinite {
    /// Its position in the outer loop.
    pub outer: usize,
    /// Its position in the inner loop.
    pub inner: usize,
    /// The element.
    pub value: f32,
}

/// Appends the columns of a view to `vectors`, each contiguous.
///
/// # Errors
/// If an element is NaN or infinite.
pub(super) fn append_columns(view: &View, vectors: &mut Vec<f32>) -> Result<(), CheckpointError> {
    let walk = Walk { start: 0, outer: (view.cols(), view.col_stride()), inner: (view.rows(), view.row_stride()) };
    append(view.bytes(), view.dtype(), walk, vectors)
        .map_err(|found| view.not_finite(found.inner, found.outer, found.value))
}

/// Appends the rows of a view to `vectors`, each contiguous.
///
/// # Errors
/// If an element is NaN or infinite.
pub(super) fn append_rows(view: &View, vectors: &mut Vec<f32>) -> Result<(), CheckpointError> {
    let walk = Walk { start: 0, outer: (view.rows(), view.row_stride()), inner: (view.cols(), view.col_stride()) };
    append(view.bytes(), view.dtype(), walk, vectors)
        .map_err(|found| view.not_finite(found.outer, found.inner, found.value))
}

/// The error for the first element of a view that is NaN or infinite, if any.
pub(super) fn first_not_finite(view: &View) -> Option<CheckpointError> {
    let mut values = Vec::new();
    (0..view.rows()).find_map(|row| {
        values.clear();
        let inner = (view.cols(), view.col_stride());
        let walk = Walk { start: row * view.row_stride(), outer: (1, view.row_stride()), inner };
        let found = append(view.bytes(), view.dtype(), walk, &mut values).err()?;
        Some(view.not_finite(row, found.inner, found.value))
    })
}

/// Appends elements to `vectors` as f32.
///
/// # Errors
/// At the first element that is NaN or infinite.
///
/// # Panics
/// If the walk extends beyond the bytes.
pub fn append(bytes: &[u8], dtype: Dtype, walk: Walk, vectors: &mut Vec<f32>) -> Result<(), NotFinite> {
    match dtype {
        Dtype::F32 => convert::<4>(bytes, walk, vectors, f32::from_le_bytes),
        Dtype::Bf16 => convert::<2>(bytes, walk, vectors, |b| half::bf16::from_le_bytes(b).to_f32()),
        Dtype::F16 => convert::<2>(bytes, walk, vectors, |b| half::f16::from_le_bytes(b).to_f32()),
    }
}

fn convert<const SIZE: usize>(
    bytes: &[u8],
    walk: Walk,
    vectors: &mut Vec<f32>,
    value: impl Fn([u8; SIZE]) -> f32,
) -> Result<(), NotFinite> {
    let Walk { start, outer: (outer, outer_stride), inner: (inner, inner_stride) } = walk;
    let (elements, _) = bytes.as_chunks::<SIZE>();
    if outer * inner == 0 {
        return Ok(());
    }
    assert!(
        start + (outer - 1) * outer_stride + (inner - 1) * inner_stride < elements.len(),
        "the walk leaves the bytes"
    );
    let first = vectors.len();
    vectors.resize(first + outer * inner, 0.0);
    for (tile, vectors) in vectors[first..].chunks_mut(TILE * inner).enumerate() {
        // Adjacent vectors may share cache lines: convert a range of each before continuing.
        for block in (0..inner).step_by(BLOCK) {
            for (i, vector) in vectors.chunks_exact_mut(inner).enumerate() {
                let from = start + (tile * TILE + i) * outer_stride + block * inner_stride;
                let stretch = &mut vector[block..inner.min(block + BLOCK)];
                for (slot, bytes) in stretch.iter_mut().zip(elements[from..].iter().step_by(inner_stride.max(1))) {
                    *slot = value(*bytes);
                }
            }
        }
    }
    for (i, vector) in vectors[first..].chunks_exact(inner).enumerate() {
        if let Some(j) = vector.iter().position(|value| !value.is_finite()) {
            return Err(NotFinite { outer: i, inner: j, value: vector[j] });
        }
    }
    Ok(())
}
