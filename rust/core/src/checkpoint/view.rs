//! Strided matrices inside tensors of a file.

use std::sync::Arc;

use super::{CheckpointError, Fault, Pages, SafetensorsFile, kernel_dtype};
use crate::kernels::{Dtype, Matrix, ShapeError};

/// A strided matrix inside a tensor of a file. All its elements are inside the tensor.
#[derive(Clone, Debug)]
pub struct View {
    file: Arc<SafetensorsFile>,
    tensor: Arc<str>,
    dtype: Dtype,
    begin: usize,
    end: usize,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// Position of a view in its tensor, in elements.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// First element.
    pub offset: usize,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl View {
    /// Makes a view of `tensor` in `file`.
    ///
    /// # Errors
    /// If the tensor is missing, the kernels do not support its dtype, or the view is empty or leaves the tensor.
    pub fn new(file: Arc<SafetensorsFile>, tensor: &str, layout: Layout) -> Result<Self, CheckpointError> {
        let entry = file.tensor(tensor)?;
        let Some(dtype) = kernel_dtype(entry.dtype) else {
            let fault = Fault::UnsupportedDtype { tensor: tensor.to_owned(), dtype: entry.dtype.to_string() };
            return Err(fault.of(file.path()));
        };
        let Layout { offset, rows, cols, row_stride, col_stride } = layout;
        let Some(span) = layout.span().filter(|span| offset + span <= entry.elements()) else {
            let (tensor, shape) = (tensor.to_owned(), entry.shape.clone());
            let fault = Fault::ViewOutOfBounds { tensor, shape, offset, rows, cols, row_stride, col_stride };
            return Err(fault.of(file.path()));
        };
        let begin = entry.begin + offset * dtype.size();
        let end = begin + span * dtype.size();
        Ok(Self { file, tensor: tensor.into(), dtype, begin, end, rows, cols, row_stride, col_stride })
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &Arc<SafetensorsFile> {
        &self.file
    }

    /// Name of the tensor.
    #[must_use]
    pub fn tensor(&self) -> &str {
        &self.tensor
    }

    /// Element type.
    #[must_use]
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of rows.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[must_use]
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// Elements from one row to the next.
    #[must_use]
    pub const fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Elements from one column to the next.
    #[must_use]
    pub const fn col_stride(&self) -> usize {
        self.col_stride
    }

    /// Bytes from the first element of the view to its last.
    #[must_use]
    pub const fn nbytes(&self) -> usize {
        self.rows * self.cols * self.dtype.size()
    }

    /// The stored bytes from the first element to the last.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.file.bytes(self.begin, self.end)
    }

    /// The pages that contain the view.
    #[must_use]
    pub fn pages(&self) -> Pages<'_> {
        self.file.pages(self.begin, self.end)
    }

    /// The view as a kernel operand.
    ///
    /// # Errors
    /// If columns are not contiguous or rows overlap.
    pub fn matrix(&self) -> Result<Matrix<'_>, ShapeError> {
        if self.col_stride != 1 && self.cols > 1 {
            return Err(ShapeError::Columns { tensor: self.tensor.to_string(), stride: self.col_stride });
        }
        Matrix::new(self.bytes(), self.dtype, self.rows, self.cols, self.row_stride)
    }

    /// The error for an element that is NaN or infinite.
    #[must_use]
    pub fn not_finite(&self, row: usize, col: usize, value: f32) -> CheckpointError {
        Fault::NotFinite { tensor: self.tensor.to_string(), row, col, value }.of(self.file.path())
    }
}

impl Layout {
    /// Number of elements from the first to the last, or `None` if the view is empty or the offset overflows.
    fn span(&self) -> Option<usize> {
        let rows = self.rows.checked_sub(1)?.checked_mul(self.row_stride)?;
        let cols = self.cols.checked_sub(1)?.checked_mul(self.col_stride)?;
        let span = rows.checked_add(cols)?.checked_add(1)?;
        self.offset.checked_add(span)?;
        Some(span)
    }
}
