//! Errors for operands that do not fit together, and for engines that cannot start.

use super::{Dtype, LevelError};

/// A shape that does not fit the bytes or the other operand.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// A matrix is larger than its bytes, or its rows overlap.
    #[error("a {}x{} {dtype:?} matrix with row stride {row_stride} does not fit {bytes} bytes", shape.0, shape.1)]
    Matrix {
        /// Rows and columns.
        shape: (usize, usize),
        /// Element type.
        dtype: Dtype,
        /// Elements from row to row.
        row_stride: usize,
        /// Bytes available.
        bytes: usize,
    },
    /// The columns are not contiguous.
    #[error("the columns of {tensor:?} are {stride} elements apart, not 1")]
    Columns {
        /// Name of the tensor.
        tensor: String,
        /// Elements from column to column.
        stride: usize,
    },
    /// The two weights have different shapes.
    #[error("aligned is {}x{} but base is {}x{}", aligned.0, aligned.1, base.0, base.1)]
    Weights {
        /// Rows and columns of the aligned weight.
        aligned: (usize, usize),
        /// Rows and columns of the base weight.
        base: (usize, usize),
    },
    /// The vectors have the wrong length for the product.
    #[error("{name} holds {values} values, not {rank}x{length}")]
    Vectors {
        /// Name of the argument.
        name: &'static str,
        /// Number of values in it.
        values: usize,
        /// Number of vectors.
        rank: usize,
        /// Length of each vector.
        length: usize,
    },
    /// Hidden states are larger than their bytes.
    #[error("{shape:?} {dtype:?} states with strides {strides:?} do not fit {bytes} bytes")]
    States {
        /// Batch, tokens, hidden.
        shape: [usize; 3],
        /// Element type.
        dtype: Dtype,
        /// Elements from one batch row to the next, and from one token to the next.
        strides: [usize; 2],
        /// Bytes available.
        bytes: usize,
    },
    /// Hidden states and reference differ in shape or dtype.
    #[error("features are {:?} {:?} but the reference is {:?} {:?}", features.0, features.1, reference.0, reference.1)]
    Reference {
        /// Shape and dtype of the features.
        features: ([usize; 3], Dtype),
        /// Shape and dtype of the reference.
        reference: ([usize; 3], Dtype),
    },
    /// A layer and the mask have different numbers of tokens.
    #[error("a block has {tokens} tokens, the mask {masked}")]
    Tokens {
        /// Tokens of the layer.
        tokens: usize,
        /// Tokens of the mask.
        masked: usize,
    },
    /// The number of gradient factors is not one per layer and token.
    #[error("{factors} factors for {blocks} blocks of {tokens} tokens")]
    Factors {
        /// Factors given.
        factors: usize,
        /// Number of layers.
        blocks: usize,
        /// Tokens of each layer.
        tokens: usize,
    },
    /// A gradient differs in size from its layer.
    #[error("{factors} factors and {bytes} bytes for the gradient of {tokens} tokens and {size} bytes")]
    Gradient {
        /// Factors given.
        factors: usize,
        /// Bytes of the output.
        bytes: usize,
        /// Tokens of the layer.
        tokens: usize,
        /// Bytes of the layer.
        size: usize,
    },
}

/// Why an engine or a stream cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The CPU does not support the level.
    #[error(transparent)]
    Level(#[from] LevelError),
    /// The system cannot start the threads of a pool.
    #[error("cannot start {threads} threads: {source}")]
    Pool {
        /// Threads requested.
        threads: usize,
        /// Error of the system.
        source: rayon::ThreadPoolBuildError,
    },
    /// The system cannot start a single thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}
