//! C·B on matrices in memory that Python keeps alive.

use std::ops::Range;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use safelora_fast_core::kernels::{Difference, Dtype, Matrix};
use safelora_fast_core::projection::{Stacked, Walk, append, apply, write_rounded};

use crate::{engines, settings};

/// (address, dtype, rows, cols, `row_stride`).
type Weight = (usize, String, usize, usize, usize);
/// (address, dtype, rows, cols, `row_stride`, `col_stride`).
type Factor = (usize, String, usize, usize, usize, usize);

/// Write C·lora_b to `output` and return ||V||_F, on matrices in memory that the caller keeps alive.
#[pyfunction]
#[pyo3(signature = (aligned, base, lora_b, output, *, normalize="frobenius", transposed=false, threads=None))]
#[allow(clippy::too_many_arguments, reason = "the token and the keyword arguments of Python")]
#[allow(clippy::needless_pass_by_value, reason = "arguments are extracted by value")]
pub(crate) fn subspace_projection(
    py: Python<'_>,
    aligned: Weight,
    base: Weight,
    lora_b: Factor,
    output: Factor,
    normalize: &str,
    transposed: bool,
    threads: Option<usize>,
) -> PyResult<f64> {
    let normalization = settings::normalization(normalize)?;
    let (threads, level) = (settings::threads(threads)?, settings::level()?);
    let [aligned, base] = [("aligned", aligned), ("base", base)].map(|(name, (address, dtype, rows, cols, stride))| {
        Block::new(name, address, &dtype, (rows, cols), (stride, 1))
    });
    let [lora_b, output] =
        [("lora_b", lora_b), ("output", output)].map(|(name, (address, dtype, rows, cols, row, col))| {
            Block::new(name, address, &dtype, (rows, cols), (row, col))
        });
    let (aligned, base, lora_b, output) = (aligned?, base?, lora_b?, output?);
    if (lora_b.rows, lora_b.cols) != (output.rows, output.cols) {
        return Err(PyValueError::new_err(format!(
            "lora_b is {}x{} but output is {}x{}",
            lora_b.rows, lora_b.cols, output.rows, output.cols
        )));
    }
    if output.overlaps_itself() {
        return Err(PyValueError::new_err("elements of output share memory"));
    }
    if output.overlaps(&aligned) || output.overlaps(&base) {
        return Err(PyValueError::new_err("output shares memory with a weight"));
    }
    let rows = if transposed { aligned.cols } else { aligned.rows };
    if lora_b.rows != rows {
        return Err(PyValueError::new_err(format!("lora_b has {} rows but V has {rows}", lora_b.rows)));
    }
    py.detach(|| {
        let mut columns = Vec::new();
        let walk = Walk { start: 0, outer: (lora_b.cols, lora_b.col_stride), inner: (lora_b.rows, lora_b.row_stride) };
        append(lora_b.bytes(), lora_b.dtype, walk, &mut columns).map_err(|found| {
            PyValueError::new_err(format!(
                "lora_b holds {} at row {}, column {}",
                found.value, found.inner, found.outer
            ))
        })?;
        let v = Difference::new(aligned.matrix()?, base.matrix()?);
        let v = v.map_err(|error| PyValueError::new_err(error.to_string()))?;
        let mut engine = engines::take(threads, level)?;
        let mut v = Stacked::new(vec![v], transposed);
        let applied = apply(&mut engine, &mut v, &columns, normalization);
        engines::keep(engine);
        let applied = applied.map_err(|_| {
            PyValueError::new_err("aligned or base holds NaN or infinity, or the products leave the range of float32")
        })?;
        let element =
            |row: usize, col: usize| (row * output.row_stride + col * output.col_stride) * output.dtype.size();
        // SAFETY: Python owns the memory of `output` during the call (documented in the stub). It overlaps no weight,
        // as checked above, and `lora_b` has been copied.
        let target = unsafe { std::slice::from_raw_parts_mut(output.address as *mut u8, output.length) };
        match write_rounded(&applied.columns, output.rows, applied.factor, output.dtype, element, target) {
            None => Ok(applied.v_norm),
            Some(overflow) => Err(PyValueError::new_err(format!(
                "the result holds {:.4e} at row {}, column {}, beyond the range of {:?}",
                overflow.value, overflow.row, overflow.col, output.dtype
            ))),
        }
    })
}

/// A strided matrix in memory.
struct Block {
    name: &'static str,
    address: usize,
    length: usize,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl Block {
    fn new(
        name: &'static str,
        address: usize,
        dtype: &str,
        (rows, cols): (usize, usize),
        (row_stride, col_stride): (usize, usize),
    ) -> PyResult<Self> {
        let dtype = settings::dtype(name, dtype)?;
        let last = rows.checked_sub(1).and_then(|rows| rows.checked_mul(row_stride));
        let across = cols.checked_sub(1).and_then(|cols| cols.checked_mul(col_stride));
        let length = last
            .zip(across)
            .and_then(|(last, across)| last.checked_add(across)?.checked_add(1)?.checked_mul(dtype.size()))
            .filter(|length| {
                address != 0 && isize::try_from(*length).is_ok() && address.checked_add(*length).is_some()
            });
        let Some(length) = length else {
            return Err(PyValueError::new_err(format!(
                "{name} is no {rows}x{cols} matrix with strides ({row_stride}, {col_stride}) at address {address:#x}"
            )));
        };
        Ok(Self { name, address, length, dtype, rows, cols, row_stride, col_stride })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: by the stub's contract this memory lives and stays unwritten during the call; its size was checked.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.length) }
    }

    fn matrix(&self) -> PyResult<Matrix<'_>> {
        Matrix::new(self.bytes(), self.dtype, self.rows, self.cols, self.row_stride)
            .map_err(|error| PyValueError::new_err(format!("{}: {error}", self.name)))
    }

    fn range(&self) -> Range<usize> {
        self.address..self.address + self.length
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.range().start < other.range().end && other.range().start < self.range().end
    }

    fn overlaps_itself(&self) -> bool {
        let by_rows = self.col_stride > 0 && (self.rows == 1 || self.row_stride > (self.cols - 1) * self.col_stride);
        let by_cols = self.row_stride > 0 && (self.cols == 1 || self.col_stride > (self.rows - 1) * self.row_stride);
        !(by_rows || by_cols)
    }
}
