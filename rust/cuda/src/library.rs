//! The kernels of one source on one device.

use std::collections::HashMap;
use std::ffi::CString;
use std::ptr;

use crate::driver::{Driver, Handle};
use crate::{CudaError, Source};

/// Loaded code and its kernels by name.
pub(crate) struct Library {
    kernels: HashMap<String, Handle>,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// Loads machine code into the current context. It stays until the process ends: launches may be under way at any time.
    pub(crate) fn load(driver: &Driver, source: Source, cubin: &[u8]) -> Result<Self, CudaError> {
        let _relaxed = driver.relax()?;
        let none = ptr::null_mut();
        let mut library = ptr::null_mut();
        // SAFETY: the code is whole (it was compiled, or its checksum held) and copied by the driver; there are no options.
        let code = unsafe {
            (driver.functions.library_load)(
                &raw mut library,
                cubin.as_ptr().cast(),
                ptr::null_mut(),
                none,
                0,
                ptr::null_mut(),
                none.cast(),
                0,
            )
        };
        driver.check("cuLibraryLoadData", code)?;
        let kernels = Self::functions(driver, source, library);
        if kernels.is_err() {
            // SAFETY: nothing of it was launched.
            unsafe { (driver.functions.library_unload)(library) };
        }
        Ok(Self { kernels: kernels? })
    }

    /// The kernels as functions of the current context: asking for them loads them, which a launch need not do then.
    fn functions(driver: &Driver, source: Source, library: Handle) -> Result<HashMap<String, Handle>, CudaError> {
        let mut functions = HashMap::new();
        for name in source.kernels() {
            let symbol = CString::new(name.as_str()).map_err(|error| CudaError::Operands(error.to_string()))?;
            let (mut kernel, mut function) = (ptr::null_mut(), ptr::null_mut());
            // SAFETY: the library is loaded, and the name lives until the call returns.
            let code = unsafe { (driver.functions.library_kernel)(&raw mut kernel, library, symbol.as_ptr()) };
            driver.check("cuLibraryGetKernel", code)?;
            // SAFETY: the kernel is the driver's.
            driver.check("cuKernelGetFunction", unsafe {
                (driver.functions.kernel_function)(&raw mut function, kernel)
            })?;
            functions.insert(name, function);
        }
        Ok(functions)
    }

    pub(crate) fn function(&self, name: &str) -> Result<Handle, CudaError> {
        let function = self.kernels.get(name).copied();
        function.ok_or_else(|| CudaError::Operands(format!("there is no kernel {name}")))
    }
}
