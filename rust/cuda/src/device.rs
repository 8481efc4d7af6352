//! One GPU: its primary context, its loaded kernels, and launches.

use std::ffi::c_int;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::argument::Parameters;
use crate::driver::{Driver, Handle};
use crate::library::Library;
use crate::{CudaError, Source};

const MAJOR: c_int = 75;
const MINOR: c_int = 76;

/// A GPU. Its primary context (the one that torch uses) is retained until the process ends.
pub(crate) struct Device {
    context: Handle,
    capability: (i32, i32),
    libraries: Mutex<Vec<(Source, Arc<Library>)>>,
}

// SAFETY: any thread may push a context; everything else is behind a lock.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// Number of blocks, and of threads per block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    pub(crate) blocks: (usize, usize),
    pub(crate) threads: u32,
}

impl Device {
    pub(crate) fn open(driver: &Driver, index: i32) -> Result<Self, CudaError> {
        let device = driver.device(index)?;
        let capability @ (major, minor) = (driver.attribute(device, MAJOR)?, driver.attribute(device, MINOR)?);
        if major < 8 {
            return Err(CudaError::TooOld { index, major, minor });
        }
        let mut context = ptr::null_mut();
        // SAFETY: the pointer is that of a handle on this stack.
        let code = unsafe { (driver.functions.primary_retain)(&raw mut context, device) };
        driver.check("cuDevicePrimaryCtxRetain", code)?;
        Ok(Self { context, capability, libraries: Mutex::new(Vec::new()) })
    }

    pub(crate) const fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// Architecture name, such as `sm_90`.
    pub(crate) fn architecture(&self) -> String {
        format!("sm_{}{}", self.capability.0, self.capability.1)
    }

    /// The kernels of a source, compiled and loaded at first use.
    pub(crate) fn library(
        &self,
        driver: &Driver,
        source: Source,
        cubin: impl FnOnce() -> Result<Vec<u8>, CudaError>,
    ) -> Result<Arc<Library>, CudaError> {
        let mut libraries = self.libraries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, library)) = libraries.iter().find(|(known, _)| *known == source) {
            return Ok(Arc::clone(library));
        }
        let cubin = cubin()?;
        let _entered = driver.enter(self.context)?;
        let library = Arc::new(Library::load(driver, source, &cubin)?);
        libraries.push((source, Arc::clone(&library)));
        Ok(library)
    }

    /// Launches kernels on `stream`, in the order in which `work` calls for them.
    pub(crate) fn on_stream(
        &self,
        driver: &Driver,
        stream: usize,
        work: impl FnOnce(&Stream<'_>) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let entered = driver.enter(self.context)?;
        let result = work(&Stream { driver, stream: ptr::with_exposed_provenance_mut(stream) });
        drop(entered);
        result
    }
}

/// The caller's stream, in its context.
pub(crate) struct Stream<'a> {
    driver: &'a Driver,
    stream: Handle,
}

impl Stream<'_> {
    /// Launches a kernel of a library; does nothing if the grid is empty.
    ///
    /// # Safety
    /// The parameters match the kernel's, in order. Device memory they point to stays valid until the kernel has run.
    pub(crate) unsafe fn launch(
        &self,
        library: &Library,
        name: &str,
        grid: Grid,
        mut parameters: impl Parameters,
    ) -> Result<(), CudaError> {
        let (across, down) = grid.blocks;
        if across == 0 || down == 0 {
            return Ok(());
        }
        let too_many = |_| CudaError::Operands(format!("{name} cannot run {across} by {down} blocks: split the batch"));
        let across = i32::try_from(across).map_err(too_many)?.cast_unsigned();
        let down = u16::try_from(down).map_err(too_many)?;
        let function = library.function(name)?;
        // SAFETY: the function is the library's; the parameters match by the contract of this function.
        let code = parameters.with_addresses(|addresses| unsafe {
            (self.driver.functions.launch)(
                function,
                across,
                u32::from(down),
                1,
                grid.threads,
                1,
                1,
                0,
                self.stream,
                addresses.as_mut_ptr(),
                ptr::null_mut(),
            )
        });
        self.driver.check("cuLaunchKernel", code)
    }
}
