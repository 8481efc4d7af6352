//! Borrowed, possibly unaligned views of stored weights.

use super::ShapeError;
use super::micro::Corner;

/// Element types that the kernels support.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// bfloat16: the upper half of a binary32.
    Bf16,
    /// IEEE binary16.
    F16,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// A row-major matrix over little-endian bytes of any alignment.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    bytes: &'a [u8],
    dtype: Dtype,
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Makes a view of `rows` rows of `cols` elements; rows start `row_stride` elements apart.
    ///
    /// # Errors
    /// If rows overlap or the last element is beyond `bytes`.
    pub fn new(bytes: &'a [u8], dtype: Dtype, rows: usize, cols: usize, row_stride: usize) -> Result<Self, ShapeError> {
        let needed = match rows {
            0 => Some(0),
            _ => (rows - 1)
                .checked_mul(row_stride)
                .and_then(|start| start.checked_add(cols))
                .and_then(|elements| elements.checked_mul(dtype.size())),
        };
        match needed {
            Some(needed) if needed <= bytes.len() && (cols <= row_stride || rows <= 1) => {
                Ok(Self { bytes, dtype, rows, cols, row_stride })
            }
            _ => Err(ShapeError::Matrix { shape: (rows, cols), dtype, row_stride, bytes: bytes.len() }),
        }
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

    /// The stored bytes of row `row`.
    ///
    /// # Panics
    /// If `row` is out of range.
    #[must_use]
    pub fn row(&self, row: usize) -> &'a [u8] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let start = row * self.row_stride * self.dtype.size();
        &self.bytes[start..start + self.cols * self.dtype.size()]
    }

    /// The address of an element. It may be outside the matrix if nothing is read there.
    pub(super) fn corner(&self, row: usize, col: usize) -> Corner {
        let size = self.dtype.size();
        let offset = row.wrapping_mul(self.row_stride).wrapping_add(col).wrapping_mul(size);
        let row_step = self.row_stride * size;
        Corner { pointer: self.bytes.as_ptr().wrapping_add(offset), row_step, dtype: self.dtype }
    }
}

/// V = aligned − base, computed element by element in f32 as it is read.
#[derive(Clone, Copy, Debug)]
pub struct Difference<'a> {
    aligned: Matrix<'a>,
    base: Matrix<'a>,
}

impl<'a> Difference<'a> {
    /// Pairs two matrices of the same shape; their dtypes may differ.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn new(aligned: Matrix<'a>, base: Matrix<'a>) -> Result<Self, ShapeError> {
        let shapes = ((aligned.rows, aligned.cols), (base.rows, base.cols));
        if shapes.0 == shapes.1 {
            Ok(Self { aligned, base })
        } else {
            Err(ShapeError::Weights { aligned: shapes.0, base: shapes.1 })
        }
    }

    /// The aligned weight.
    #[must_use]
    pub const fn aligned(&self) -> Matrix<'a> {
        self.aligned
    }

    /// The base weight.
    #[must_use]
    pub const fn base(&self) -> Matrix<'a> {
        self.base
    }

    /// Number of rows of V as stored.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.aligned.rows
    }

    /// Number of columns of V as stored.
    #[must_use]
    pub const fn cols(&self) -> usize {
        self.aligned.cols
    }
}
