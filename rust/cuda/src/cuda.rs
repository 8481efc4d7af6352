//! Driver, compiler and devices for kernels, found on first use.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::device::Device;
use crate::driver::Driver;
use crate::library::Library;
use crate::{Cache, CudaError, Nvrtc, Source};

/// The driver, the devices in use, and where to find the compiler and the cache.
#[allow(missing_debug_implementations, reason = "handles of the driver")]
pub struct Cuda {
    driver: Driver,
    nvrtc_candidates: Vec<String>,
    nvrtc: OnceLock<Nvrtc>,
    cache: Cache,
    devices: Mutex<Vec<(i32, Arc<Device>)>>,
}

impl Cuda {
    /// Loads the first of `drivers` (names and paths) that can be loaded, and initializes it. NVRTC is loaded when a
    /// kernel is needed.
    ///
    /// # Errors
    /// If there is no driver, it is too old, or it fails to initialize.
    pub fn open(drivers: &[String], nvrtc: Vec<String>, cache: Option<PathBuf>) -> Result<Self, CudaError> {
        Ok(Self {
            driver: Driver::open(drivers)?,
            nvrtc_candidates: nvrtc,
            nvrtc: OnceLock::new(),
            cache: Cache::new(cache),
            devices: Mutex::new(Vec::new()),
        })
    }

    /// Driver version, such as 13020 for CUDA 13.2.
    ///
    /// # Errors
    /// If the driver call fails.
    pub fn driver_version(&self) -> Result<i32, CudaError> {
        self.driver.version()
    }

    /// Number of GPUs.
    ///
    /// # Errors
    /// If the driver call fails.
    pub fn device_count(&self) -> Result<i32, CudaError> {
        self.driver.device_count()
    }

    /// Compute capability of a GPU.
    ///
    /// # Errors
    /// If there is no such GPU, or it is too old for the kernels.
    pub fn capability(&self, device: i32) -> Result<(i32, i32), CudaError> {
        Ok(self.device(device)?.capability())
    }

    /// Compiles and loads the kernels of a source on a GPU ahead of the first launch.
    ///
    /// # Errors
    /// If there is no such GPU or no NVRTC, or NVRTC does not support the GPU.
    pub fn prepare(&self, device: i32, source: Source) -> Result<(), CudaError> {
        self.library(&*self.device(device)?, source).map(drop)
    }

    pub(crate) const fn driver(&self) -> &Driver {
        &self.driver
    }

    pub(crate) fn device(&self, index: i32) -> Result<Arc<Device>, CudaError> {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, device)) = devices.iter().find(|(known, _)| *known == index) {
            return Ok(Arc::clone(device));
        }
        let device = Arc::new(Device::open(&self.driver, index)?);
        devices.push((index, Arc::clone(&device)));
        Ok(device)
    }

    pub(crate) fn library(&self, device: &Device, source: Source) -> Result<Arc<Library>, CudaError> {
        device.library(&self.driver, source, || self.cache.cubin(self.nvrtc()?, source, &device.architecture()))
    }

    fn nvrtc(&self) -> Result<&Nvrtc, CudaError> {
        if let Some(nvrtc) = self.nvrtc.get() {
            return Ok(nvrtc);
        }
        let nvrtc = Nvrtc::open(&self.nvrtc_candidates)?;
        Ok(self.nvrtc.get_or_init(|| nvrtc))
    }
}
