//! Invalid headers and indices: fuzzing seeds, mutations of valid files, and single cases with their messages.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use safelora_fast_core::checkpoint::{Layout, SafetensorsFile, View, read_index};

#[path = "../fuzz/exercise.rs"]
mod exercise;

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let paths = fs::read_dir(&folder).expect("the seed corpus").map(|entry| entry.expect("a seed").path());
    paths.map(|path| fs::read(path).expect("a seed")).collect()
}

#[test]
fn every_seed_is_accepted_or_refused_without_a_panic() {
    let (headers, indices) = (seeds("header"), seeds("index"));
    assert!(headers.len() > 30 && indices.len() > 15);
    for seed in &headers {
        exercise::header(seed);
    }
    for seed in &indices {
        exercise::index(seed);
    }
}

/// A change to some bytes.
#[derive(Clone, Debug)]
enum Mutation {
    Overwrite(prop::sample::Index, u8),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index),
    Truncate(prop::sample::Index),
    Repeat(prop::sample::Index),
}

impl Mutation {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        match self {
            Self::Overwrite(at, value) => *at.get_mut(bytes) = *value,
            Self::Insert(at, values) => {
                let at = at.index(bytes.len());
                bytes.splice(at..at, values.iter().copied());
            }
            Self::Remove(at) => {
                bytes.remove(at.index(bytes.len()));
            }
            Self::Truncate(at) => bytes.truncate(at.index(bytes.len())),
            Self::Repeat(at) => {
                let tail = bytes[at.index(bytes.len())..].to_vec();
                bytes.extend(tail);
            }
        }
    }
}

fn mutate(mutations: &[Mutation], bytes: &mut Vec<u8>) {
    for mutation in mutations {
        mutation.apply(bytes);
    }
}

fn mutations() -> impl Strategy<Value = Vec<Mutation>> {
    let tokens =
        prop::sample::select(vec![&b"0"[..], b"9", b"-", b",", b"\"", b"{", b"}", b"../", b"18446744073709551615"]);
    let mutation = prop_oneof![
        (any::<prop::sample::Index>(), any::<u8>()).prop_map(|(at, value)| Mutation::Overwrite(at, value)),
        (any::<prop::sample::Index>(), tokens).prop_map(|(at, token)| Mutation::Insert(at, token.to_vec())),
        any::<prop::sample::Index>().prop_map(Mutation::Remove),
        any::<prop::sample::Index>().prop_map(Mutation::Truncate),
        any::<prop::sample::Index>().prop_map(Mutation::Repeat),
    ];
    prop::collection::vec(mutation, 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_headers_never_panic(seed: prop::sample::Index, mutations in mutations(), repair: bool) {
        let mut bytes = seed.get(&seeds("header")).clone();
        // Mutating only the header and then fixing its length reaches deeper than mutating everything.
        if repair && bytes.len() > 8 {
            let mut header = bytes.split_off(8);
            mutate(&mutations, &mut header);
            bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header);
        } else {
            mutate(&mutations, &mut bytes);
        }
        exercise::header(&bytes);
    }

    #[test]
    fn mutated_indices_never_panic(seed: prop::sample::Index, mutations in mutations()) {
        let mut bytes = seed.get(&seeds("index")).clone();
        mutate(&mutations, &mut bytes);
        exercise::index(&bytes);
    }
}

/// Writes a file with this header, followed by these bytes.
fn file(folder: &Path, header: &str, data: &[u8]) -> PathBuf {
    let path = folder.join("model.safetensors");
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
    fs::write(&path, bytes).expect("a writable folder");
    path
}

fn message(path: &Path) -> String {
    SafetensorsFile::open(path).expect_err("a hostile file").to_string()
}

#[test]
fn each_attack_is_named_with_file_and_remedy() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    let cases: [(&str, &[u8], &str); 16] = [
        (
            r#"{"a":{"dtype":"U8","shape":[2000],"data_offsets":[0,2000]}}"#,
            &[0; 1500],
            "truncated: header promises 2,000 bytes of tensors, the file has 1,500; download it again",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#,
            &[0; 3],
            "corrupted: 2 bytes after the last tensor",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#,
            &[0; 6],
            r#"tensor "b" starts at 2, inside the tensor before it, which ends at 4"#,
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}"#,
            &[0; 6],
            r#"2 bytes before tensor "b" belong to no tensor"#,
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}"#,
            &[0; 4],
            r#"2 bytes before tensor "a" belong to no tensor"#,
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[4,3]}}"#,
            &[0; 4],
            r#"tensor "a" ends at 3, before its start at 4"#,
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[3,2],"data_offsets":[0,16]}}"#,
            &[0; 16],
            r#"tensor "a" of shape [3, 2] and dtype F32 needs 24 bytes, its offsets give it 16"#,
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[9223372036854775808,4],"data_offsets":[0,4]}}"#,
            &[0; 4],
            r#"the shape or offsets of tensor "a" overflow"#,
        ),
        (r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#, &[0; 2], "does not fill whole bytes"),
        (
            r#"{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,1]}}"#,
            &[0; 1],
            r#"tensor "a" has the unknown dtype "Q9""#,
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
            &[0; 2],
            r#"corrupted header: tensor "a" is listed twice"#,
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#,
            &[0; 1],
            "corrupted header: invalid value: integer `-1`",
        ),
        (r#"{"a":{"dtype":"U8","shape":[1]}}"#, &[0; 1], "corrupted header: missing field `data_offsets`"),
        (r#"{"a":"#, &[], "corrupted header: EOF while parsing"),
        ("[]", &[], "corrupted header: invalid type: sequence, expected an object of tensors"),
        ("", &[], "corrupted header: EOF while parsing"),
    ];
    for (header, data, expected) in cases {
        let path = file(folder, header, data);
        let message = message(&path);
        assert!(message.starts_with(&format!("{}: ", path.display())), "{message}");
        assert!(message.contains(expected), "{message}\ndoes not contain\n{expected}");
        assert!(!message.contains('\n'));
    }
}

#[test]
fn files_that_are_something_else_are_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.safetensors");
    let cases: [(&[u8], &str); 10] = [
        (b"", "at least 8 bytes, this one has 0"),
        (b"1234567", "at least 8 bytes, this one has 7"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x03\x04\0\0\x08\x08\0\0\0\0", "a zip archive, as torch.save writes"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P", "a Python pickle"),
        (b"GGUF\x03\0\0\0\x01\0", "a GGUF file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (
            b"\xff\xff\xff\xff\xff\xff\xff\xff{}",
            "a header of 18,446,744,073,709,551,615 bytes, the format allows 100,000,000",
        ),
        (b"\x00\x01\0\0\0\0\0\0{}", "header promises 256 bytes of itself, the file has 2"),
        (b"\x03\0\0\0\0\0\0\0\"\xff\"", "not UTF-8 at byte 1"),
    ];
    for (bytes, expected) in cases {
        fs::write(&path, bytes).expect("a writable folder");
        assert!(message(&path).contains(expected), "{}\ndoes not contain\n{expected}", message(&path));
    }
    assert!(message(folder.path()).contains("not a regular file"));
    assert!(message(&folder.path().join("none")).contains("no such file"));
    assert!(message(&path.join("below")).contains("no such file"));
}

#[test]
fn dtypes_without_kernels_are_read_but_not_viewed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for dtype in ["F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"] {
        let header = format!(r#"{{"a":{{"dtype":"{dtype}","shape":[2,2],"data_offsets":[0,4]}}}}"#);
        let file = Arc::new(SafetensorsFile::open(file(folder.path(), &header, b"1234")).expect("a valid file"));
        assert_eq!(file.read("a").expect("a tensor"), b"1234");
        let layout = Layout { offset: 0, rows: 2, cols: 2, row_stride: 2, col_stride: 1 };
        let error = View::new(file, "a", layout).expect_err("no kernel").to_string();
        assert!(error.contains(&format!("tensor \"a\" is {dtype}; only F32, BF16 and F16")), "{error}");
    }
}

#[test]
fn an_index_stays_in_its_folder_and_names_files_that_exist() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (snapshot, blobs) = (folder.path().join("snapshot"), folder.path().join("blobs"));
    fs::create_dir(&snapshot).expect("a writable folder");
    fs::create_dir(&blobs).expect("a writable folder");
    fs::write(blobs.join("hash"), b"").expect("a writable folder");
    #[cfg(unix)]
    std::os::unix::fs::symlink("../blobs/hash", snapshot.join("one.safetensors")).expect("a link");
    let path = snapshot.join("model.safetensors.index.json");
    let read = |map: &str| {
        fs::write(&path, format!(r#"{{"weight_map":{map}}}"#)).expect("a writable folder");
        read_index(&path).map_err(|error| error.to_string())
    };
    // The Hugging Face cache uses links to its blobs: the name stays in the folder, the file may be elsewhere.
    #[cfg(unix)]
    assert_eq!(read(r#"{"a":"one.safetensors"}"#).expect("a valid index")["a"], snapshot.join("one.safetensors"));
    let cases = [
        (r#"{"a":"../blobs/hash"}"#, r#"tensor "a" is said to be in "../blobs/hash", which leaves the folder"#),
        (r#"{"a":"/etc/hostname"}"#, "leaves the folder of the index"),
        (r#"{"a":"x/../../blobs/hash"}"#, "leaves the folder of the index"),
        (r#"{"a":"..\\blobs"}"#, "leaves the folder of the index"),
        (r#"{"a":""}"#, "leaves the folder of the index"),
        (r#"{"a":"two.safetensors"}"#, r#"names the shard "two.safetensors" (of tensor "a"), which is missing"#),
        (r#"{"a":"."}"#, "which is missing"),
        (r#"{"a":3}"#, "corrupted index: invalid type: integer `3`, expected a string"),
        (r#"{"a":"one.safetensors","a":"b"}"#, r#"corrupted index: tensor "a" is listed twice"#),
        ("[]", "expected an object of file names"),
    ];
    for (map, expected) in cases {
        let message = read(map).expect_err("a hostile index");
        assert!(message.contains(expected), "{message}\ndoes not contain\n{expected}");
        assert!(message.starts_with(&path.display().to_string()) && !message.contains('\n'));
    }
}
