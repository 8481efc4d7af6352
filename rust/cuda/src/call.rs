//! Libraries that are loaded at run time, and their functions.

use std::error::Error as _;
use std::ffi::OsStr;

use libloading::Library;

use crate::CudaError;

/// Loads the first of `candidates` that can be loaded. Also returns its name.
pub(crate) fn open(what: &'static str, candidates: &[String]) -> Result<(Library, String), CudaError> {
    let mut reason = "nothing was given to look for".to_owned();
    for candidate in candidates {
        // SAFETY: the candidates are names of the driver or NVRTC, whose initializers may run at any time.
        match unsafe { Library::new(OsStr::new(candidate)) } {
            Ok(library) => return Ok((library, candidate.clone())),
            // The error only says that loading failed; its source says why.
            Err(error) => reason = one_line(&error.source().map_or_else(|| error.to_string(), ToString::to_string)),
        }
    }
    Err(CudaError::LibraryMissing { what, looked_for: candidates.to_vec(), reason })
}

/// Turns a library's text into one line.
pub(crate) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A symbol without its terminating zero.
pub(crate) fn name(symbol: &'static [u8]) -> &'static str {
    std::str::from_utf8(symbol).unwrap_or("a function").trim_end_matches('\0')
}

/// Declares a table of functions that is filled from a library and keeps the library loaded.
macro_rules! functions {
    ($(#[$meta:meta])* $table:ident: $what:literal { $($name:ident = $symbol:literal ($($argument:ty),*);)* }) => {
        $(#[$meta])*
        #[allow(missing_debug_implementations, reason = "a list of addresses")]
        pub(crate) struct $table {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) -> i32,)*
            _library: libloading::Library,
        }

        impl $table {
            pub(crate) fn load(candidates: &[String]) -> Result<Self, crate::CudaError> {
                let (library, path) = crate::call::open($what, candidates)?;
                Ok(Self {
                    $($name: {
                        // SAFETY: the signature is that of the library's header; the table keeps the library loaded.
                        let symbol = unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> i32>($symbol) };
                        *symbol.map_err(|_| crate::CudaError::SymbolMissing {
                            what: $what,
                            library: path.clone(),
                            symbol: crate::call::name($symbol),
                        })?
                    },)*
                    _library: library,
                })
            }
        }
    };
}

pub(crate) use functions;
