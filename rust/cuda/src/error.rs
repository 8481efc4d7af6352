//! Errors between this crate and a GPU.

/// An error in one line: which call or library failed, how, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// The library could not be found or loaded.
    #[error("{what} was not found: looked for {}; the last said: {reason}", looked_for.join(", "))]
    LibraryMissing {
        /// "the CUDA driver" or "NVRTC".
        what: &'static str,
        /// Every name and path that was tried.
        looked_for: Vec<String>,
        /// Why the last one could not be loaded.
        reason: String,
    },
    /// The library is too old.
    #[error("{library} has no {symbol}; update {what}: version 12.0 or newer is needed")]
    SymbolMissing {
        /// "the CUDA driver" or "NVRTC".
        what: &'static str,
        /// The file that was loaded.
        library: String,
        /// The missing function.
        symbol: &'static str,
    },
    /// A driver call failed.
    #[error("{call} failed with {name} ({code}): {text}")]
    Driver {
        /// The function of the driver.
        call: &'static str,
        /// The CUresult.
        code: i32,
        /// The driver's name of the code.
        name: String,
        /// The driver's description of the code.
        text: String,
    },
    /// An NVRTC call other than compiling failed.
    #[error("{call} failed: {text} ({code})")]
    Nvrtc {
        /// The function of NVRTC.
        call: &'static str,
        /// The nvrtcResult.
        code: i32,
        /// NVRTC's description of the code.
        text: String,
    },
    /// A kernel does not compile for an architecture.
    #[error("{source_name} does not compile for {architecture} with NVRTC {version}: {log}")]
    Compilation {
        /// The kernel's file.
        source_name: &'static str,
        /// Architecture name, such as `sm_90`.
        architecture: String,
        /// NVRTC's version.
        version: String,
        /// The first line of the compiler's log.
        log: String,
    },
    /// There is no GPU with this index.
    #[error("there is no CUDA device {index}: the driver lists {count}")]
    NoDevice {
        /// The requested index.
        index: i32,
        /// Number of GPUs.
        count: i32,
    },
    /// The GPU lacks instructions that the kernels need.
    #[error(
        "CUDA device {index} has compute capability {major}.{minor}; the kernels need 8.0 or newer: choose another backend"
    )]
    TooOld {
        /// The device.
        index: i32,
        /// Major number of its compute capability.
        major: i32,
        /// Minor number of its compute capability.
        minor: i32,
    },
    /// Operands do not fit together.
    #[error("{0}")]
    Operands(String),
}
