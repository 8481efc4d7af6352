//! NVRTC, CUDA's runtime compiler.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;

use crate::call::{functions, one_line};
use crate::{CudaError, Source};

type Program = *mut c_void;

functions! {
    /// As of NVRTC 12.0; later versions keep them.
    Functions: "NVRTC" {
        version = b"nvrtcVersion\0" (*mut c_int, *mut c_int);
        create = b"nvrtcCreateProgram\0"
            (*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char);
        compile = b"nvrtcCompileProgram\0" (Program, c_int, *const *const c_char);
        destroy = b"nvrtcDestroyProgram\0" (*mut Program);
        cubin_size = b"nvrtcGetCUBINSize\0" (Program, *mut usize);
        cubin = b"nvrtcGetCUBIN\0" (Program, *mut c_char);
        log_size = b"nvrtcGetProgramLogSize\0" (Program, *mut usize);
        log = b"nvrtcGetProgramLog\0" (Program, *mut c_char);
    }
}

/// The loaded NVRTC.
#[allow(missing_debug_implementations, reason = "a list of addresses")]
pub struct Nvrtc {
    functions: Functions,
    version: (i32, i32),
}

impl Nvrtc {
    /// Loads the first of `candidates` (names and paths) that can be loaded.
    ///
    /// # Errors
    /// If none can be loaded, or it is older than 12.0.
    pub fn open(candidates: &[String]) -> Result<Self, CudaError> {
        let functions = Functions::load(candidates)?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the pointers are those of numbers on this stack.
        check("nvrtcVersion", unsafe { (functions.version)(&raw mut major, &raw mut minor) })?;
        Ok(Self { functions, version: (major, minor) })
    }

    /// Version, such as `13.2`.
    #[must_use]
    pub fn version(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    /// Compiles a source to machine code for one architecture (`sm_90`).
    ///
    /// # Errors
    /// If the source does not compile, or the architecture is newer than this NVRTC.
    pub fn compile(&self, source: Source, architecture: &str) -> Result<Vec<u8>, CudaError> {
        let text = CString::new(source.text()).map_err(|error| CudaError::Operands(error.to_string()))?;
        let name = CString::new(source.name()).map_err(|error| CudaError::Operands(error.to_string()))?;
        let architecture_option = format!("--gpu-architecture={architecture}");
        let options = source.options().iter().copied().chain([architecture_option.as_str()]);
        let options: Vec<CString> = options.filter_map(|option| CString::new(option).ok()).collect();
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();

        let count = c_int::try_from(options.len()).map_err(|error| CudaError::Operands(error.to_string()))?;

        let mut program = Compiling { functions: &self.functions, program: ptr::null_mut() };
        // SAFETY: the strings live until the call returns; there are no headers.
        let code = unsafe {
            (self.functions.create)(&raw mut program.program, text.as_ptr(), name.as_ptr(), 0, ptr::null(), ptr::null())
        };
        check("nvrtcCreateProgram", code)?;
        // SAFETY: the program was made above; the options live until the call returns.
        let code = unsafe { (self.functions.compile)(program.program, count, options.as_ptr()) };
        if code != 0 {
            return Err(CudaError::Compilation {
                source_name: source.name(),
                architecture: architecture.to_owned(),
                version: self.version(),
                log: program.log().unwrap_or_else(|| format!("nvrtcResult {code}")),
            });
        }
        let mut size = 0;
        // SAFETY: the program is compiled; the pointer is that of a number on this stack.
        check("nvrtcGetCUBINSize", unsafe { (self.functions.cubin_size)(program.program, &raw mut size) })?;
        let mut cubin = vec![0_u8; size];
        // SAFETY: the buffer has the size that NVRTC returned.
        check("nvrtcGetCUBIN", unsafe { (self.functions.cubin)(program.program, cubin.as_mut_ptr().cast()) })?;
        Ok(cubin)
    }
}

/// An NVRTC program, destroyed on drop.
struct Compiling<'a> {
    functions: &'a Functions,
    program: Program,
}

impl Compiling<'_> {
    /// The compiler's log on one line.
    fn log(&self) -> Option<String> {
        let mut size = 0;
        // SAFETY: the program exists; the pointer is that of a number on this stack.
        if unsafe { (self.functions.log_size)(self.program, &raw mut size) } != 0 || size == 0 {
            return None;
        }
        let mut text = vec![0_u8; size + 1];
        // SAFETY: the buffer has the size that NVRTC returned.
        if unsafe { (self.functions.log)(self.program, text.as_mut_ptr().cast()) } != 0 {
            return None;
        }
        let text = CStr::from_bytes_until_nul(&text).ok()?.to_string_lossy();
        let errors = text.lines().find(|line| line.contains("error")).or_else(|| text.lines().next())?;
        Some(one_line(errors))
    }
}

impl Drop for Compiling<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: NVRTC created the program, and nothing else uses it.
            unsafe { (self.functions.destroy)(&raw mut self.program) };
        }
    }
}

fn check(call: &'static str, code: c_int) -> Result<(), CudaError> {
    let text = match code {
        0 => return Ok(()),
        1 => "out of memory",
        3 => "invalid input",
        4 => "invalid program",
        5 => "invalid option",
        7 => "its libnvrtc-builtins is missing beside it",
        _ => "see nvrtcResult in NVRTC's documentation",
    };
    Err(CudaError::Nvrtc { call, code, text: text.to_owned() })
}
