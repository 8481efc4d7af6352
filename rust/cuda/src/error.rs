//! What can go wrong between this crate and a GPU.

/// One line that says which call or library failed, how, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// No library of this purpose could be loaded.
    #[error("{what} was not found: looked for {}; the last said: {reason}", looked_for.join(", "))]
    LibraryMissing {
        /// "the CUDA driver" or "NVRTC".
        what: &'static str,
        /// Every name and path that was tried.
        looked_for: Vec<String>,
        /// Why the last of them could not be loaded.
        reason: String,
    },
    /// A library that is older than what is needed.
    #[error("{library} has no {symbol}; update {what}: version 12.0 or newer is needed")]
    SymbolMissing {
        /// "the CUDA driver" or "NVRTC".
        what: &'static str,
        /// The file that was loaded.
        library: String,
        /// The function it lacks.
        symbol: &'static str,
    },
    /// The driver refuses a call.
    #[error("{call} failed with {name} ({code}): {text}")]
    Driver {
        /// The function of the driver.
        call: &'static str,
        /// The CUresult.
        code: i32,
        /// Its name, as the driver has it.
        name: String,
        /// Its meaning, as the driver has it.
        text: String,
    },
    /// NVRTC refuses a call other than compiling.
    #[error("{call} failed: {text} ({code})")]
    Nvrtc {
        /// The function of NVRTC.
        call: &'static str,
        /// The nvrtcResult.
        code: i32,
        /// Its meaning, as NVRTC has it.
        text: String,
    },
    /// A kernel does not compile for a device.
    #[error("{source_name} does not compile for {architecture} with NVRTC {version}: {log}")]
    Compilation {
        /// The kernel's file.
        source_name: &'static str,
        /// As `sm_90`.
        architecture: String,
        /// NVRTC's version.
        version: String,
        /// The first line of what the compiler says.
        log: String,
    },
    /// There is no GPU of this number.
    #[error("there is no CUDA device {index}: the driver lists {count}")]
    NoDevice {
        /// The number asked for.
        index: i32,
        /// How many there are.
        count: i32,
    },
    /// A GPU without the instructions that the kernels need.
    #[error(
        "CUDA device {index} has compute capability {major}.{minor}; the kernels need 8.0 or newer: choose another backend"
    )]
    TooOld {
        /// The device.
        index: i32,
        /// Its major version.
        major: i32,
        /// Its minor version.
        minor: i32,
    },
    /// Operands that do not fit one another.
    #[error("{0}")]
    Operands(String),
}
