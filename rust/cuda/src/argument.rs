//! Arguments of kernels: numbers that fit, and where they are.

use std::ffi::c_void;
use std::ptr;

use crate::CudaError;

pub(crate) fn int(what: &str, value: usize) -> Result<i32, CudaError> {
    i32::try_from(value).map_err(|_| CudaError::Operands(format!("{value} {what} are more than a kernel can count")))
}

pub(crate) fn long(strides: [usize; 2]) -> Result<[i64; 2], CudaError> {
    let [row, token] = strides.map(i64::try_from);
    row.and_then(|row| Ok([row, token?]))
        .map_err(|_| CudaError::Operands(format!("strides {strides:?} are larger than memory")))
}

/// The address of an argument, as the driver wants it.
pub(crate) fn at<T>(argument: &mut T) -> *mut c_void {
    ptr::from_mut(argument).cast()
}
