//! The index of a sharded checkpoint: which shard contains which tensor.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};

use super::file::open_regular;
use super::{CheckpointError, Fault};

/// The largest index that is accepted.
const MOST: u64 = 100_000_000;

/// Tensor name → name of its shard, relative to the folder of the index.
pub type WeightMap = BTreeMap<String, String>;

/// Reads `weight_map` of a `*.safetensors.index.json`: tensor name → absolute path of its shard.
///
/// An entry may be a symbolic link, as in the Hugging Face cache, but its name must stay in the index's folder.
///
/// # Errors
/// If the index cannot be read, is malformed, or names a shard that is missing or outside its folder.
pub fn read_index(path: &Path) -> Result<BTreeMap<String, PathBuf>, CheckpointError> {
    resolve(path).map_err(|fault| fault.of(path))
}

fn resolve(path: &Path) -> Result<BTreeMap<String, PathBuf>, Fault> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(MOST + 1).read_to_end(&mut bytes)?;
    let entries = parse_index(&bytes)?;
    let path = std::path::absolute(path)?;
    let folder = path.parent().unwrap_or(&path);
    let mut shards: HashMap<String, PathBuf> = HashMap::new();
    let mut located = BTreeMap::new();
    for (tensor, shard) in entries {
        let file = if let Some(file) = shards.get(&shard) {
            file.clone()
        } else {
            let file = folder.join(&shard);
            if !file.is_file() {
                return Err(Fault::MissingShard { tensor, shard });
            }
            shards.insert(shard, file.clone());
            file
        };
        located.insert(tensor, file);
    }
    Ok(located)
}

/// Parses and checks the `weight_map` of an index. Does not check whether the shards exist.
///
/// # Errors
/// If the bytes are not an index, or an entry points outside its folder.
pub fn parse_index(bytes: &[u8]) -> Result<WeightMap, Fault> {
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(Fault::LfsPointer);
    }
    let invalid = |reason: String| Fault::InvalidJson { what: "index", reason };
    if bytes.len() as u64 > MOST {
        return Err(invalid(format!("larger than {MOST} bytes")));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| Fault::NotUtf8(error.valid_up_to()))?;
    let index: Index = serde_json::from_str(text).map_err(|error| invalid(error.to_string()))?;
    if let Some(tensor) = index.weight_map.duplicate {
        return Err(Fault::DuplicateName { what: "index", tensor });
    }
    for (tensor, shard) in &index.weight_map.entries {
        if !stays_inside(shard) {
            return Err(Fault::EscapingShard { tensor: tensor.clone(), shard: shard.clone() });
        }
    }
    Ok(index.weight_map.entries)
}

/// Whether a relative name stays inside its folder, on this system and on Windows.
fn stays_inside(shard: &str) -> bool {
    let windows = shard.contains('\\') || shard.contains(':');
    let mut components = Path::new(shard).components().peekable();
    !windows
        && components.peek().is_some()
        && components.all(|component| matches!(component, Component::Normal(_) | Component::CurDir))
}

#[derive(Deserialize)]
struct Index {
    weight_map: Entries,
}

struct Entries {
    entries: WeightMap,
    duplicate: Option<String>,
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let mut entries = WeightMap::new();
        let mut duplicate = None;
        while let Some(tensor) = map.next_key::<String>()? {
            match entries.entry(tensor) {
                Entry::Vacant(entry) => {
                    entry.insert(map.next_value()?);
                }
                Entry::Occupied(entry) => {
                    map.next_value::<IgnoredAny>()?;
                    duplicate.get_or_insert(entry.key().clone());
                }
            }
        }
        Ok(Entries { entries, duplicate })
    }
}
