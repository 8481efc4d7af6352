//! The functions of the CUDA driver.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;

use crate::CudaError;
use crate::call::functions;

/// A CUcontext, CUlibrary, CUkernel or CUstream: an address in the driver.
pub(crate) type Handle = *mut c_void;

const RELAXED: c_int = 2;

functions! {
    /// As of CUDA 12.0; later drivers keep them.
    Functions: "the CUDA driver" {
        init = b"cuInit\0" (c_uint);
        error_name = b"cuGetErrorName\0" (c_int, *mut *const c_char);
        error_string = b"cuGetErrorString\0" (c_int, *mut *const c_char);
        driver_version = b"cuDriverGetVersion\0" (*mut c_int);
        device_count = b"cuDeviceGetCount\0" (*mut c_int);
        device_get = b"cuDeviceGet\0" (*mut c_int, c_int);
        device_attribute = b"cuDeviceGetAttribute\0" (*mut c_int, c_int, c_int);
        primary_retain = b"cuDevicePrimaryCtxRetain\0" (*mut Handle, c_int);
        context_push = b"cuCtxPushCurrent_v2\0" (Handle);
        context_pop = b"cuCtxPopCurrent_v2\0" (*mut Handle);
        capture_mode = b"cuThreadExchangeStreamCaptureMode\0" (*mut c_int);
        library_load = b"cuLibraryLoadData\0"
            (*mut Handle, *const c_void, *mut c_int, *mut Handle, c_uint, *mut c_int, *mut Handle, c_uint);
        library_unload = b"cuLibraryUnload\0" (Handle);
        library_kernel = b"cuLibraryGetKernel\0" (*mut Handle, Handle, *const c_char);
        kernel_function = b"cuKernelGetFunction\0" (*mut Handle, Handle);
        launch = b"cuLaunchKernel\0"
            (Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void);
    }
}

/// The initialized driver.
pub(crate) struct Driver {
    pub(crate) functions: Functions,
}

// In every call below, the driver writes its results before it returns zero.
impl Driver {
    pub(crate) fn open(candidates: &[String]) -> Result<Self, CudaError> {
        let driver = Self { functions: Functions::load(candidates)? };
        // SAFETY: the arguments are those of the header.
        driver.check("cuInit", unsafe { (driver.functions.init)(0) })?;
        Ok(driver)
    }

    /// Makes an error of a CUresult that is not zero.
    pub(crate) fn check(&self, call: &'static str, code: c_int) -> Result<(), CudaError> {
        if code == 0 {
            return Ok(());
        }
        let words = |function: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int, unknown: &str| {
            let mut text = ptr::null();
            // SAFETY: the driver returns a string that lives as long as the driver, or none.
            unsafe {
                if function(code, &raw mut text) == 0 && !text.is_null() {
                    CStr::from_ptr(text).to_string_lossy().into_owned()
                } else {
                    unknown.to_owned()
                }
            }
        };
        Err(CudaError::Driver {
            call,
            code,
            name: words(self.functions.error_name, "an unknown error"),
            text: words(self.functions.error_string, "the driver has no words for it"),
        })
    }

    /// Driver version, such as 13020 for CUDA 13.2.
    pub(crate) fn version(&self) -> Result<i32, CudaError> {
        let mut version = 0;
        // SAFETY: the pointer is that of a number on this stack.
        self.check("cuDriverGetVersion", unsafe { (self.functions.driver_version)(&raw mut version) })?;
        Ok(version)
    }

    pub(crate) fn device_count(&self) -> Result<i32, CudaError> {
        let mut count = 0;
        // SAFETY: the pointer is that of a number on this stack.
        self.check("cuDeviceGetCount", unsafe { (self.functions.device_count)(&raw mut count) })?;
        Ok(count)
    }

    /// The driver's handle of a device.
    pub(crate) fn device(&self, index: i32) -> Result<c_int, CudaError> {
        let count = self.device_count()?;
        if !(0..count).contains(&index) {
            return Err(CudaError::NoDevice { index, count });
        }
        let mut device = 0;
        // SAFETY: the pointer is that of a number on this stack.
        self.check("cuDeviceGet", unsafe { (self.functions.device_get)(&raw mut device, index) })?;
        Ok(device)
    }

    pub(crate) fn attribute(&self, device: c_int, attribute: c_int) -> Result<i32, CudaError> {
        let mut value = 0;
        // SAFETY: the pointer is that of a number on this stack.
        let code = unsafe { (self.functions.device_attribute)(&raw mut value, attribute, device) };
        self.check("cuDeviceGetAttribute", code)?;
        Ok(value)
    }

    /// Makes a context current until the guard is dropped.
    pub(crate) fn enter(&self, context: Handle) -> Result<Entered<'_>, CudaError> {
        // SAFETY: the driver returned this context, and it is still retained.
        self.check("cuCtxPushCurrent", unsafe { (self.functions.context_push)(context) })?;
        Ok(Entered { driver: self })
    }

    /// Lets this thread load code until the guard is dropped, even if one of its streams is being captured.
    pub(crate) fn relax(&self) -> Result<Relaxed<'_>, CudaError> {
        let mut mode = RELAXED;
        // SAFETY: the pointer is that of a number on this stack.
        self.check("cuThreadExchangeStreamCaptureMode", unsafe { (self.functions.capture_mode)(&raw mut mode) })?;
        Ok(Relaxed { driver: self, before: mode })
    }
}

/// A current context; dropping the guard restores the previous one.
pub(crate) struct Entered<'a> {
    driver: &'a Driver,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut context = ptr::null_mut();
        // SAFETY: this thread pushed a context. An error cannot be reported from `drop`.
        unsafe { (self.driver.functions.context_pop)(&raw mut context) };
    }
}

/// A relaxed capture mode of this thread.
pub(crate) struct Relaxed<'a> {
    driver: &'a Driver,
    before: c_int,
}

impl Drop for Relaxed<'_> {
    fn drop(&mut self) {
        // SAFETY: the pointer is that of a number in this guard. An error cannot be reported from `drop`.
        unsafe { (self.driver.functions.capture_mode)(&raw mut self.before) };
    }
}
