//! A mapped safetensors file.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::{CheckpointError, Fault, Header, Pages, TensorEntry};

/// A memory-mapped safetensors file whose header has been checked against the file.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    header: Header,
}

impl SafetensorsFile {
    /// Maps the file and checks its header.
    ///
    /// # Errors
    /// If the file is missing, truncated or of another format, or its header does not match it.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, CheckpointError> {
        let path = path.into();
        match Self::map(&path) {
            Ok((map, header)) => Ok(Self { path, map, header }),
            Err(fault) => Err(fault.of(&path)),
        }
    }

    fn map(path: &Path) -> Result<(Mmap, Header), Fault> {
        let file = open_regular(path)?;
        let size = file.metadata()?.len();
        if size == 0 {
            return Err(Fault::TooShort(0));
        }
        // SAFETY: the map is read-only, and this program never writes its inputs. If another process truncates the file
        // while it is mapped, reads raise SIGBUS; the documentation of this module says so.
        let map = unsafe { Mmap::map(&file)? };
        let header = Header::parse(&map)?;
        Ok((map, header))
    }

    /// The path as given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the file in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.map.len()
    }

    /// Offset of the first tensor byte from the start of the file.
    #[must_use]
    pub const fn data_start(&self) -> usize {
        self.header.data_start
    }

    /// The header's `__metadata__`.
    #[must_use]
    pub const fn metadata(&self) -> &HashMap<String, String> {
        &self.header.metadata
    }

    /// Tensors by name.
    #[must_use]
    pub const fn tensors(&self) -> &BTreeMap<String, TensorEntry> {
        &self.header.tensors
    }

    /// The entry of one tensor.
    ///
    /// # Errors
    /// If the file has no such tensor.
    pub fn tensor(&self, name: &str) -> Result<&TensorEntry, CheckpointError> {
        self.header.tensors.get(name).ok_or_else(|| Fault::NoSuchTensor(name.to_owned()).of(&self.path))
    }

    /// The bytes of one tensor.
    ///
    /// # Errors
    /// If the file has no such tensor.
    pub fn read(&self, name: &str) -> Result<&[u8], CheckpointError> {
        let entry = self.tensor(name)?;
        Ok(&self.map[entry.begin..entry.end])
    }

    /// Bytes `begin..end` of the file. The range must come from a checked entry or view.
    pub(super) fn bytes(&self, begin: usize, end: usize) -> &[u8] {
        &self.map[begin..end]
    }

    /// The pages that contain bytes `begin..end` of the file.
    pub(super) fn pages(&self, begin: usize, end: usize) -> Pages<'_> {
        Pages::new(&self.map, begin, end)
    }
}

/// Opens a regular file. Pipes are rejected before opening, which could block.
pub(super) fn open_regular(path: &Path) -> Result<File, Fault> {
    let missing = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Fault::Missing,
        _ => Fault::Unreadable(error),
    };
    if !std::fs::metadata(path).map_err(missing)?.is_file() {
        return Err(Fault::NotAFile);
    }
    File::open(path).map_err(missing)
}
