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

// SAFETY: any thread may use the driver's handles.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// Loads machine code into the current context. It stays loaded until the process ends, because launches may still
    /// be running.
    pub(crate) fn load(driver: &Driver, source: Source, cubin: &[u8]) -> Result<Self, CudaError> {
        let _relaxed = driver.relax()?;
        let none = ptr::null_mut();
        let mut library = ptr::null_mut();
        // SAFETY: the code is complete (just compiled, or its checksum matched), and the driver copies it; there are no
        // options.
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
            // SAFETY: none of its kernels has been launched.
            unsafe { (driver.functions.library_unload)(library) };
        }
        Ok(Self { kernels: kernels? })
    }

    /// Gets the kernels as functions of the current context. This loads them, so that a launch need not.
    fn functions(driver: &Driver, source: Source, library: Handle) -> Result<HashMap<String, Handle>, CudaError> {
        let mut functions = HashMap::new();
        for name in source.kernels() {
            let symbol = CString::new(name.as_str()).map_err(|error| CudaError::Operands(error.to_string()))?;
            let (mut kernel, mut function) = (ptr::null_mut(), ptr::null_mut());
            // SAFETY: the library is loaded, and the name lives until the call returns.
            let code = unsafe { (driver.functions.library_kernel)(&raw mut kernel, library, symbol.as_ptr()) };
            driver.check("cuLibraryGetKernel", code)?;
            // SAFETY: the driver returned this kernel.
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
