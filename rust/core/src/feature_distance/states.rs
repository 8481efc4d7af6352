//! Hidden states in memory.

use crate::kernels::{Dtype, ShapeError};

/// Hidden states [batch, tokens, hidden] over little-endian bytes of any alignment; the hidden axis is contiguous.
#[derive(Clone, Copy, Debug)]
pub struct States<'a> {
    bytes: &'a [u8],
    dtype: Dtype,
    shape: [usize; 3],
    strides: [usize; 2],
}

impl<'a> States<'a> {
    /// Makes a view; `strides` are the elements from one batch row to the next, and from one token to the next.
    ///
    /// # Errors
    /// If the last element is beyond `bytes`.
    pub fn new(bytes: &'a [u8], dtype: Dtype, shape: [usize; 3], strides: [usize; 2]) -> Result<Self, ShapeError> {
        if Self::span(dtype, shape, strides).is_some_and(|span| span <= bytes.len()) {
            // Tokens without elements are never read, so their strides do not matter.
            let strides = if shape[2] == 0 { [0; 2] } else { strides };
            Ok(Self { bytes, dtype, shape, strides })
        } else {
            Err(ShapeError::States { shape, dtype, strides, bytes: bytes.len() })
        }
    }

    /// Bytes from the first element to the end of the last; `None` if that exceeds the address range.
    #[must_use]
    pub fn span(dtype: Dtype, shape: [usize; 3], strides: [usize; 2]) -> Option<usize> {
        let [batch, tokens, hidden] = shape;
        batch.checked_mul(tokens)?.checked_mul(hidden)?.checked_mul(dtype.size())?;
        if batch == 0 || tokens == 0 || hidden == 0 {
            return Some(0);
        }
        let last = (batch - 1).checked_mul(strides[0])?.checked_add((tokens - 1).checked_mul(strides[1])?)?;
        last.checked_add(hidden)?.checked_mul(dtype.size())
    }

    /// Element type.
    #[must_use]
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Batch, tokens, hidden.
    #[must_use]
    pub const fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Number of tokens in the batch.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// The stored bytes of the tokens starting at token `first` of the batch.
    fn tokens_from(&self, first: usize) -> impl Iterator<Item = &'a [u8]> {
        let Self { bytes, dtype, shape: [batch, tokens, hidden], strides } = *self;
        let (mut row, mut token) = (first.checked_div(tokens).unwrap_or(batch), first.checked_rem(tokens).unwrap_or(0));
        std::iter::from_fn(move || {
            if row == batch {
                return None;
            }
            let start = (row * strides[0] + token * strides[1]) * dtype.size();
            token += 1;
            if token == tokens {
                (row, token) = (row + 1, 0);
            }
            Some(&bytes[start..start + hidden * dtype.size()])
        })
    }
}

/// Hidden states and those of the reference model.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    pub(super) features: States<'a>,
    pub(super) reference: States<'a>,
}

impl<'a> Pair<'a> {
    /// Pairs states of the same shape and dtype.
    ///
    /// # Errors
    /// If shapes or dtypes differ.
    pub fn new(features: States<'a>, reference: States<'a>) -> Result<Self, ShapeError> {
        let kinds = ((features.shape, features.dtype), (reference.shape, reference.dtype));
        if kinds.0 == kinds.1 {
            Ok(Self { features, reference })
        } else {
            Err(ShapeError::Reference { features: kinds.0, reference: kinds.1 })
        }
    }

    /// Element type.
    #[must_use]
    pub const fn dtype(&self) -> Dtype {
        self.features.dtype
    }

    /// Number of tokens in the batch.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.features.rows()
    }

    /// Batch, tokens, hidden.
    #[must_use]
    pub const fn shape(&self) -> [usize; 3] {
        self.features.shape
    }

    /// Bytes of a contiguous tensor of this shape.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.rows() * self.row_size()
    }

    /// Bytes of one token in one of the tensors.
    pub(super) const fn row_size(&self) -> usize {
        self.features.shape[2] * self.features.dtype.size()
    }

    /// The stored bytes of both, starting at token `first` of the batch.
    pub(super) fn tokens_from(&self, first: usize) -> impl Iterator<Item = [&'a [u8]; 2]> {
        self.features.tokens_from(first).zip(self.reference.tokens_from(first)).map(|(h, h0)| [h, h0])
    }

    /// Number of tokens that one thread takes at a time.
    pub(super) fn unit(&self) -> usize {
        (UNIT / self.row_size().max(1)).max(1)
    }
}

/// Bytes of one tensor that a thread takes at a time.
const UNIT: usize = 1 << 16;
