//! A stand-in driver and NVRTC, built with the C compiler. Every test loads its own copies.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use libloading::Library;
use tempfile::TempDir;

/// Copies of the stand-ins, and a folder for the cache.
pub(crate) struct StandIn {
    folder: TempDir,
    pub(crate) driver: Handle,
    pub(crate) nvrtc: Handle,
}

/// A library handle, with which a test controls the copy that the tested code has loaded.
pub(crate) struct Handle {
    path: PathBuf,
    library: Library,
}

impl StandIn {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let folder = TempDir::new().expect("a temporary folder");
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let [driver, nvrtc] = ["driver", "nvrtc"].map(|name| {
            // The loader identifies libraries by name as well as by file.
            let path = folder.path().join(format!("lib{name}-{number}.so"));
            build(&Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/stand_in/{name}.c")), &path);
            Handle::open(path)
        });
        Self { folder, driver, nvrtc }
    }

    pub(crate) fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    /// Opens the host layer on these stand-ins.
    pub(crate) fn open(&self) -> Result<safelora_fast_cuda::Cuda, safelora_fast_cuda::CudaError> {
        safelora_fast_cuda::Cuda::open(&[self.driver.name()], vec![self.nvrtc.name()], Some(self.cache()))
    }
}

/// Compiles a shared library, leaving out the functions that `-D` names.
pub(crate) fn build(source: &Path, library: &Path) {
    let status = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(library)
        .arg(source)
        .status()
        .expect("the C compiler that Rust links with");
    assert!(status.success(), "{} does not compile", source.display());
}

impl Handle {
    pub(crate) fn open(path: PathBuf) -> Self {
        // SAFETY: this is our library, and it runs nothing when loaded.
        let library = unsafe { Library::new(&path) }.expect("a library that was just built");
        Self { path, library }
    }

    pub(crate) fn name(&self) -> String {
        self.path.to_str().expect("a path of UTF-8").to_owned()
    }

    /// Calls recorded so far, one per line.
    pub(crate) fn record(&self) -> Vec<String> {
        // SAFETY: the function has this signature and returns its own string.
        let text = unsafe {
            let record =
                self.library.get::<unsafe extern "C" fn() -> *const c_char>(b"stand_in_record").expect("a stand-in");
            CStr::from_ptr(record())
        };
        text.to_str().expect("ASCII").lines().map(str::to_owned).collect()
    }

    pub(crate) fn forget(&self) {
        // SAFETY: the function has this signature.
        unsafe { self.library.get::<unsafe extern "C" fn()>(b"stand_in_forget").expect("a stand-in")() }
    }

    /// Makes the driver's `call` return `code` from now on.
    pub(crate) fn fail(&self, call: &str, code: c_int) {
        let call = CString::new(call).expect("a name");
        // SAFETY: the function has this signature and copies the name.
        unsafe {
            let fail = self.library.get::<unsafe extern "C" fn(*const c_char, c_int)>(b"stand_in_fail");
            fail.expect("a stand-in")(call.as_ptr(), code);
        }
    }

    pub(crate) fn devices(&self, count: c_int, major: c_int, minor: c_int) {
        // SAFETY: the function has this signature.
        unsafe {
            let devices = self.library.get::<unsafe extern "C" fn(c_int, c_int, c_int)>(b"stand_in_devices");
            devices.expect("a stand-in")(count, major, minor);
        }
    }

    /// Calls a function that takes nothing and returns a number.
    pub(crate) fn number(&self, name: &[u8]) -> c_int {
        // SAFETY: such functions take nothing and return a number.
        unsafe { self.library.get::<unsafe extern "C" fn() -> c_int>(name).expect("a stand-in")() }
    }

    /// Sets a number in the compiler.
    pub(crate) fn set(&self, name: &[u8], value: c_int) {
        // SAFETY: such functions take one number.
        unsafe { self.library.get::<unsafe extern "C" fn(c_int)>(name).expect("a stand-in")(value) }
    }
}
