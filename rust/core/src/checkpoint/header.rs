//! The header of a safetensors file, checked against the length of the file.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{MapAccess, Visitor};

use super::{Fault, dtype};

/// Size of the length field before the header.
const LENGTH_BYTES: u64 = 8;
/// The largest header that the format allows.
const MOST: u64 = 100_000_000;

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Offset of its first byte from the start of the file.
    pub begin: usize,
    /// Offset of the byte after its last byte.
    pub end: usize,
}

impl TensorEntry {
    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A checked header: its tensors cover every byte after it exactly once.
#[derive(Clone, Debug, Default)]
pub struct Header {
    /// Offset of the first tensor byte from the start of the file.
    pub data_start: usize,
    /// The `__metadata__` of the header.
    pub metadata: HashMap<String, String>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, TensorEntry>,
}

impl Header {
    /// Reads and checks the header of a file with these bytes.
    ///
    /// # Errors
    /// If the bytes are not a safetensors file, or the header does not match the file.
    pub fn parse(file: &[u8]) -> Result<Self, Fault> {
        let size = file.len() as u64;
        let Some((length, rest)) = file.split_first_chunk::<8>() else {
            return Err(Fault::TooShort(size));
        };
        let length = u64::from_le_bytes(*length);
        if length > MOST {
            return Err(other_format(file).unwrap_or(Fault::HeaderTooLarge(length, MOST)));
        }
        let Some(header) = usize::try_from(length).ok().and_then(|length| rest.get(..length)) else {
            return Err(other_format(file).unwrap_or(Fault::HeaderTruncated(length, size - LENGTH_BYTES)));
        };
        let text = std::str::from_utf8(header).map_err(|error| Fault::NotUtf8(error.valid_up_to()))?;
        let stored: Stored = serde_json::from_str(text)
            .map_err(|error| Fault::InvalidJson { what: "header", reason: error.to_string() })?;
        if let Some(tensor) = stored.duplicate {
            return Err(Fault::DuplicateName { what: "header", tensor });
        }
        let data_start = LENGTH_BYTES + length;
        let tensors = place(stored.tensors, data_start, size - data_start)?;
        Ok(Self { data_start: data_start as usize, metadata: stored.metadata, tensors })
    }
}

/// Checks every tensor, and checks that together they cover `present` bytes exactly once.
fn place(stored: Vec<(String, Info)>, data_start: u64, present: u64) -> Result<BTreeMap<String, TensorEntry>, Fault> {
    let mut checked = Vec::with_capacity(stored.len());
    for (name, info) in stored {
        checked.push(check(name, info)?);
    }
    checked.sort_by_key(|(_, entry, (begin, end))| (*begin, *end, entry.elements()));
    let mut expected = 0;
    for (name, _, (begin, end)) in &checked {
        let (tensor, begin) = (name, *begin);
        if begin < expected {
            return Err(Fault::Overlap { tensor: tensor.clone(), begin, expected });
        }
        if begin > expected {
            return Err(Fault::Gap { tensor: tensor.clone(), begin, expected });
        }
        expected = *end;
    }
    if expected > present {
        return Err(Fault::Truncated { promised: expected, present });
    }
    if expected < present {
        return Err(Fault::TrailingBytes(present - expected));
    }
    let entries = checked.into_iter().map(|(name, mut entry, (begin, end))| {
        entry.begin = (data_start + begin) as usize;
        entry.end = (data_start + end) as usize;
        (name, entry)
    });
    Ok(entries.collect())
}

/// Checks that the dtype is known and that the shape matches the offsets. Returns the tensor with its offsets.
fn check(tensor: String, info: Info) -> Result<(String, TensorEntry, (u64, u64)), Fault> {
    let Some(dtype) = dtype::parse(&info.dtype) else {
        return Err(Fault::UnknownDtype { tensor, dtype: info.dtype });
    };
    let (begin, end) = info.data_offsets;
    let Some(given) = end.checked_sub(begin) else {
        return Err(Fault::ReversedOffsets { tensor, begin, end });
    };
    let sizes: Option<Vec<usize>> = info.shape.iter().map(|size| usize::try_from(*size).ok()).collect();
    let bits = info.shape.iter().try_fold(dtype.bitsize() as u64, |bits, size| bits.checked_mul(*size));
    let (Some(shape), Some(bits)) = (sizes, bits) else {
        return Err(Fault::Overflow(tensor));
    };
    if !bits.is_multiple_of(8) {
        return Err(Fault::PartialByte { tensor, shape, dtype: info.dtype });
    }
    let needed = bits / 8;
    if needed != given {
        return Err(Fault::WrongLength { tensor, shape, dtype: info.dtype, needed, given });
    }
    Ok((tensor, TensorEntry { dtype, shape, begin: 0, end: 0 }, (begin, end)))
}

/// The actual file format, if the first bytes reveal it.
fn other_format(file: &[u8]) -> Option<Fault> {
    const FORMATS: [(&[u8], &str); 7] = [
        (b"PK\x03\x04", "a zip archive, as torch.save writes .bin and .pt files"),
        (b"\x80\x02", "a Python pickle, as old torch.save writes .bin and .pt files"),
        (b"\x80\x04", "a Python pickle"),
        (b"GGUF", "a GGUF file"),
        (b"\x1f\x8b", "a gzip archive"),
        (b"<!", "a web page (perhaps a failed download)"),
        (b"<html", "a web page (perhaps a failed download)"),
    ];
    if file.starts_with(b"version https://git-lfs") {
        return Some(Fault::LfsPointer);
    }
    FORMATS.iter().find(|(start, _)| file.starts_with(start)).map(|(_, name)| Fault::OtherFormat(name))
}

/// An entry as it appears in the header.
#[derive(Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's JSON, before its numbers are checked.
struct Stored {
    metadata: HashMap<String, String>,
    tensors: Vec<(String, Info)>,
    duplicate: Option<String>,
}

impl<'de> Deserialize<'de> for Stored {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(StoredVisitor)
    }
}

struct StoredVisitor;

impl<'de> Visitor<'de> for StoredVisitor {
    type Value = Stored;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Stored, A::Error> {
        let mut metadata: Option<HashMap<String, String>> = None;
        let mut tensors = Vec::new();
        let mut names = std::collections::HashSet::new();
        let mut duplicate = None;
        while let Some(name) = map.next_key::<String>()? {
            if !names.insert(name.clone()) {
                duplicate.get_or_insert_with(|| name.clone());
            }
            if name == "__metadata__" {
                metadata = map.next_value::<Option<HashMap<String, String>>>()?;
            } else {
                tensors.push((name, map.next_value()?));
            }
        }
        Ok(Stored { metadata: metadata.unwrap_or_default(), tensors, duplicate })
    }
}
