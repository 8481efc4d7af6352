//! LoRA factors and weights as f32, with a check that they are finite.

use crate::checkpoint::{CheckpointError, View};
use crate::kernels::Dtype;

/// Appends the columns of a view to `vectors`, each contiguous.
///
/// # Errors
/// When an element is NaN or infinite.
pub(super) fn append_columns(view: &View, vectors: &mut Vec<f32>) -> Result<(), CheckpointError> {
    append(view, (view.cols(), view.col_stride()), (view.rows(), view.row_stride()), vectors)
        .map_err(|(col, row, value)| view.not_finite(row, col, value))
}

/// Appends the rows of a view to `vectors`, each contiguous.
///
/// # Errors
/// When an element is NaN or infinite.
pub(super) fn append_rows(view: &View, vectors: &mut Vec<f32>) -> Result<(), CheckpointError> {
    append(view, (view.rows(), view.row_stride()), (view.cols(), view.col_stride()), vectors)
        .map_err(|(row, col, value)| view.not_finite(row, col, value))
}

/// The first element of a view that is NaN or infinite, as an error.
pub(super) fn first_not_finite(view: &View) -> Option<CheckpointError> {
    let mut row_values = Vec::new();
    (0..view.rows()).find_map(|row| {
        row_values.clear();
        let one = (1, view.row_stride());
        let (start, columns) = (row * view.row_stride(), (view.cols(), view.col_stride()));
        append_from(view, start, one, columns, &mut row_values)
            .err()
            .map(|(_, col, value)| view.not_finite(row, col, value))
    })
}

type NotFinite = (usize, usize, f32);

fn append(view: &View, outer: (usize, usize), inner: (usize, usize), vectors: &mut Vec<f32>) -> Result<(), NotFinite> {
    append_from(view, 0, outer, inner, vectors)
}

/// Appends elements in two nested loops of (count, stride), starting at element `start` of the view.
fn append_from(
    view: &View,
    start: usize,
    outer: (usize, usize),
    inner: (usize, usize),
    vectors: &mut Vec<f32>,
) -> Result<(), NotFinite> {
    let bytes = view.bytes();
    match view.dtype() {
        Dtype::F32 => convert::<4>(bytes, start, outer, inner, vectors, f32::from_le_bytes),
        Dtype::Bf16 => convert::<2>(bytes, start, outer, inner, vectors, |b| half::bf16::from_le_bytes(b).to_f32()),
        Dtype::F16 => convert::<2>(bytes, start, outer, inner, vectors, |b| half::f16::from_le_bytes(b).to_f32()),
    }
}

fn convert<const SIZE: usize>(
    bytes: &[u8],
    start: usize,
    (outer, outer_stride): (usize, usize),
    (inner, inner_stride): (usize, usize),
    vectors: &mut Vec<f32>,
    value: impl Fn([u8; SIZE]) -> f32,
) -> Result<(), NotFinite> {
    let (elements, _) = bytes.as_chunks::<SIZE>();
    vectors.reserve(outer * inner);
    for i in 0..outer {
        let first = vectors.len();
        let elements = elements[start + i * outer_stride..].iter().step_by(inner_stride.max(1));
        vectors.extend(elements.take(inner).map(|bytes| value(*bytes)));
        let vector = &vectors[first..];
        if let Some(j) = vector.iter().position(|value| !value.is_finite()) {
            return Err((i, j, vector[j]));
        }
    }
    Ok(())
}
