//! Checks that fuzz targets and ordinary tests run on hostile bytes: no panics, and accepted input must be sound.

use safelora_fast_core::checkpoint::{Header, parse_index};

/// Parses `bytes` as a safetensors file. The tensors of an accepted header cover the bytes after it exactly once.
pub(crate) fn header(bytes: &[u8]) {
    match Header::parse(bytes) {
        Ok(header) => {
            let mut entries: Vec<_> = header.tensors.values().collect();
            entries.sort_by_key(|entry| (entry.begin, entry.end));
            let mut position = header.data_start;
            for entry in entries {
                assert_eq!(entry.begin, position);
                assert_eq!(bytes[entry.begin..entry.end].len() * 8, entry.elements() * entry.dtype.bitsize());
                position = entry.end;
            }
            assert_eq!(position, bytes.len());
        }
        Err(fault) => assert!(!fault.to_string().is_empty()),
    }
}

/// Parses `bytes` as an index. The entries of an accepted index stay inside its folder.
pub(crate) fn index(bytes: &[u8]) {
    match parse_index(bytes) {
        Ok(entries) => {
            for shard in entries.values() {
                assert!(!shard.is_empty() && !shard.starts_with('/'));
                assert!(shard.split('/').all(|component| component != ".."));
            }
        }
        Err(fault) => assert!(!fault.to_string().is_empty()),
    }
}
