//! Errors of checkpoint files.

use std::io;
use std::path::{Path, PathBuf};

/// A checkpoint file, index or tensor that is invalid. The message is one line with file, fault and remedy.
#[derive(Debug, thiserror::Error)]
#[error("{}: {fault}", path.display())]
pub struct CheckpointError {
    /// The file at fault.
    pub path: PathBuf,
    /// What is wrong with it.
    pub fault: Fault,
}

/// The ways in which a checkpoint can be invalid.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The file does not exist.
    #[error("no such file; check the path or download the checkpoint again")]
    Missing,
    /// The path is a folder, a pipe or a device.
    #[error("not a regular file; give the path of a .safetensors file")]
    NotAFile,
    /// The system cannot open, map or read the file.
    #[error("cannot be read: {0}; check its permissions and its disk")]
    Unreadable(#[from] io::Error),
    /// The file is a git-lfs pointer instead of the weights.
    #[error("a git-lfs pointer, not the weights; run `git lfs pull` in its folder")]
    LfsPointer,
    /// The file has another format.
    #[error("{0}, not a safetensors file; convert it to safetensors first")]
    OtherFormat(&'static str),
    /// The file is too short for the length of a header.
    #[error("truncated: a safetensors file has at least 8 bytes, this one has {0}; download it again")]
    TooShort(u64),
    /// The header is larger than the format allows.
    #[error("not a safetensors file: it claims a header of {} bytes, the format allows {}", grouped(*.0), grouped(*.1))]
    HeaderTooLarge(u64, u64),
    /// The header extends beyond the file.
    #[error("truncated: header promises {} bytes of itself, the file has {}; download it again", grouped(*.0), grouped(*.1))]
    HeaderTruncated(u64, u64),
    /// The header is not UTF-8.
    #[error("corrupted header: not UTF-8 at byte {0}; download it again")]
    NotUtf8(usize),
    /// The header or the index is not valid JSON of the expected form.
    #[error("corrupted {what}: {reason}; download it again")]
    InvalidJson {
        /// The header or the index.
        what: &'static str,
        /// What the parser found, and where.
        reason: String,
    },
    /// Two entries have the same name.
    #[error("corrupted {what}: tensor {tensor:?} is listed twice; download it again")]
    DuplicateName {
        /// The header or the index.
        what: &'static str,
        /// The name that occurs twice.
        tensor: String,
    },
    /// An element type that safetensors does not define.
    #[error(
        "tensor {tensor:?} has the unknown dtype {dtype:?}; convert the checkpoint to float32, bfloat16 or float16"
    )]
    UnknownDtype {
        /// Name of the tensor.
        tensor: String,
        /// The dtype as the header spells it.
        dtype: String,
    },
    /// The shape or offsets of a tensor overflow.
    #[error("corrupted header: the shape or offsets of tensor {0:?} overflow; download it again")]
    Overflow(String),
    /// A tensor ends before it begins.
    #[error("corrupted header: tensor {tensor:?} ends at {end}, before its start at {begin}; download it again")]
    ReversedOffsets {
        /// Name of the tensor.
        tensor: String,
        /// Its first byte among the tensor bytes.
        begin: u64,
        /// The byte after its last byte.
        end: u64,
    },
    /// The shape and dtype of a tensor need a different number of bytes than its offsets span.
    #[error("corrupted header: tensor {tensor:?} of shape {shape:?} and dtype {dtype} needs {} bytes, its offsets give it {}; download it again", grouped(*.needed), grouped(*.given))]
    WrongLength {
        /// Name of the tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its dtype.
        dtype: String,
        /// Bytes that the shape needs.
        needed: u64,
        /// Bytes between the offsets.
        given: u64,
    },
    /// A tensor of a packed dtype does not fill whole bytes.
    #[error(
        "corrupted header: tensor {tensor:?} of shape {shape:?} and dtype {dtype} does not fill whole bytes; download it again"
    )]
    PartialByte {
        /// Name of the tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its dtype.
        dtype: String,
    },
    /// Two tensors share bytes.
    #[error(
        "corrupted header: tensor {tensor:?} starts at {begin}, inside the tensor before it, which ends at {expected}; download it again"
    )]
    Overlap {
        /// Name of the later tensor.
        tensor: String,
        /// Its first byte among the tensor bytes.
        begin: u64,
        /// The byte after the last of the tensor before it.
        expected: u64,
    },
    /// Bytes between two tensors belong to neither.
    #[error("corrupted header: {} bytes before tensor {tensor:?} belong to no tensor; download it again", grouped(.begin - .expected))]
    Gap {
        /// Name of the tensor after the gap.
        tensor: String,
        /// Its first byte among the tensor bytes.
        begin: u64,
        /// The byte after the last of the tensor before it.
        expected: u64,
    },
    /// The tensors need more bytes than the file has.
    #[error("truncated: header promises {} bytes of tensors, the file has {}; download it again", grouped(*.promised), grouped(*.present))]
    Truncated {
        /// Bytes of all tensors.
        promised: u64,
        /// Bytes after the header.
        present: u64,
    },
    /// The file continues after its last tensor.
    #[error("corrupted: {} bytes after the last tensor belong to no tensor; download it again", grouped(*.0))]
    TrailingBytes(u64),
    /// The file has no tensor of this name.
    #[error("no tensor {0:?} in this file; check that index and shard belong together")]
    NoSuchTensor(String),
    /// The kernels do not support the tensor's dtype.
    #[error("tensor {tensor:?} is {dtype}; only F32, BF16 and F16 can be projected: dequantize the checkpoint first")]
    UnsupportedDtype {
        /// Name of the tensor.
        tensor: String,
        /// Its dtype.
        dtype: String,
    },
    /// A view extends beyond its tensor.
    #[error(
        "tensor {tensor:?} of shape {shape:?} does not hold a {rows}x{cols} matrix at element {offset} with strides ({row_stride}, {col_stride})"
    )]
    ViewOutOfBounds {
        /// Name of the tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// First element of the view.
        offset: usize,
        /// Rows of the view.
        rows: usize,
        /// Columns of the view.
        cols: usize,
        /// Elements from row to row.
        row_stride: usize,
        /// Elements from column to column.
        col_stride: usize,
    },
    /// A weight is NaN or infinite.
    #[error(
        "tensor {tensor:?} holds {value} at row {row}, column {col}; the checkpoint is damaged or its training diverged"
    )]
    NotFinite {
        /// Name of the tensor.
        tensor: String,
        /// Row of the first such element, in the matrix as used.
        row: usize,
        /// Column of that element.
        col: usize,
        /// The element.
        value: f32,
    },
    /// An index entry points outside the folder of the index.
    #[error(
        "tensor {tensor:?} is said to be in {shard:?}, which leaves the folder of the index; do not use this checkpoint"
    )]
    EscapingShard {
        /// Name of the tensor.
        tensor: String,
        /// The entry.
        shard: String,
    },
    /// The file of an index entry does not exist.
    #[error("names the shard {shard:?} (of tensor {tensor:?}), which is missing; download the checkpoint again")]
    MissingShard {
        /// Name of a tensor in the shard.
        tensor: String,
        /// The entry.
        shard: String,
    },
}

impl Fault {
    /// Makes the error for this fault of `path`.
    #[must_use]
    pub fn of(self, path: &Path) -> CheckpointError {
        CheckpointError { path: path.to_path_buf(), fault: self }
    }
}

/// Formats a number with commas between thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_one_line_with_file_fault_and_remedy() {
        let error = Fault::Truncated { promised: 1234, present: 1_000_000 }.of(Path::new("model.safetensors"));
        assert_eq!(
            error.to_string(),
            "model.safetensors: truncated: header promises 1,234 bytes of tensors, the file has 1,000,000; download it again"
        );
        assert_eq!(grouped(12), "12");
    }
}
