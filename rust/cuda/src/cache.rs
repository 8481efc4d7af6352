//! Compiled kernels on disk, for the next process.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use crate::{CudaError, Nvrtc, Source};

/// The first bytes of a cache file, followed by the SHA-256 of the machine code and the code itself.
const MAGIC: &[u8; 8] = b"SLFCUBIN";
const HEADER: usize = MAGIC.len() + 32;
/// Larger files are not read; no kernel has this size.
const LARGEST: u64 = 1 << 28;

/// A folder of compiled kernels, or no folder.
///
/// The name of a file is the SHA-256 of everything its content depends on: source, options, architecture, NVRTC's
/// version. It is written under another name and then renamed, so every reader finds it complete. It is checked when
/// read, and replaced if damaged.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// Makes a cache in `folder`, which is created when needed. Without a folder every process compiles again.
    #[must_use]
    pub const fn new(folder: Option<PathBuf>) -> Self {
        Self { folder }
    }

    /// Returns the machine code of a source, from the cache or else compiled and then cached.
    ///
    /// # Errors
    /// If the source does not compile. A cache that cannot be written is no error: the next process compiles again.
    pub fn cubin(&self, nvrtc: &Nvrtc, source: Source, architecture: &str) -> Result<Vec<u8>, CudaError> {
        let path = self.folder.as_ref().map(|folder| folder.join(file_name(nvrtc, source, architecture)));
        if let Some(found) = path.as_deref().and_then(read) {
            return Ok(found);
        }
        let cubin = nvrtc.compile(source, architecture)?;
        if let Some(path) = path {
            // A full disk or another user's folder must not stop a training run that does not need the cache.
            let _ = write(&path, &cubin);
        }
        Ok(cubin)
    }
}

fn file_name(nvrtc: &Nvrtc, source: Source, architecture: &str) -> String {
    let version = nvrtc.version();
    let mut digest = Sha256::new();
    let fields = [source.name(), source.text(), architecture, version.as_str()];
    for field in fields.into_iter().chain(source.options().iter().copied()) {
        digest.update((field.len() as u64).to_le_bytes());
        digest.update(field);
    }
    format!("{}.cubin", hexadecimal(&digest.finalize()))
}

fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The machine code in a file, or `None` if the file is missing or damaged.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut file = File::open(path).ok()?;
    if file.metadata().ok()?.len() > LARGEST {
        return None;
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    let (magic, rest) = bytes.split_at_checked(MAGIC.len())?;
    let (digest, cubin) = rest.split_at_checked(HEADER - MAGIC.len())?;
    let whole = magic == MAGIC && digest == Sha256::digest(cubin).as_slice();
    whole.then(|| cubin.to_vec())
}

fn write(path: &Path, cubin: &[u8]) -> io::Result<()> {
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    let folder = path.parent().ok_or(io::ErrorKind::NotFound)?;
    fs::create_dir_all(folder)?;
    let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
    let partial = folder.join(format!(".partial-{}-{number}", std::process::id()));
    let written = write_whole(&partial, cubin).and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written
}

fn write_whole(path: &Path, cubin: &[u8]) -> io::Result<()> {
    // A process with the same id that died here may have left such a file: it is overwritten.
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    file.write_all(MAGIC)?;
    file.write_all(&Sha256::digest(cubin))?;
    file.write_all(cubin)
}
