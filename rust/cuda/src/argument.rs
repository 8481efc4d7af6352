//! Kernel parameters: range-checked numbers, and their addresses.

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

/// The values of a kernel's parameters, in order. The driver needs the address of each.
pub(crate) trait Parameters {
    fn with_addresses<Result>(&mut self, call: impl FnOnce(&mut [*mut c_void]) -> Result) -> Result;
}

macro_rules! parameters {
    ($($name:ident)*) => {
        impl<$($name),*> Parameters for ($($name,)*) {
            #[allow(non_snake_case, reason = "a value is named after its type")]
            fn with_addresses<Result>(&mut self, call: impl FnOnce(&mut [*mut c_void]) -> Result) -> Result {
                let ($($name,)*) = self;
                call(&mut [$(ptr::from_mut($name).cast()),*])
            }
        }
    };
}

parameters!(A B C);
parameters!(A B C D);
parameters!(A B C D E F);
parameters!(A B C D E F G);
