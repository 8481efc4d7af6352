//! Operands that do not fit each other, and engines that cannot start.

use super::{Dtype, LevelError};

/// A shape that does not fit the bytes or the other operand.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// A matrix that is larger than its bytes, or whose rows overlap.
    #[error("a {}x{} {dtype:?} matrix with row stride {row_stride} does not fit {bytes} bytes", shape.0, shape.1)]
    Matrix {
        /// Rows and columns.
        shape: (usize, usize),
        /// Element type.
        dtype: Dtype,
        /// Elements from row to row.
        row_stride: usize,
        /// Bytes that there are.
        bytes: usize,
    },
    /// Columns that the kernels cannot read.
    #[error("the columns of {tensor:?} are {stride} elements apart, not 1")]
    Columns {
        /// Name of the tensor.
        tensor: String,
        /// Elements from column to column.
        stride: usize,
    },
    /// Two weights of different shapes.
    #[error("aligned is {}x{} but base is {}x{}", aligned.0, aligned.1, base.0, base.1)]
    Weights {
        /// Rows and columns of the aligned weight.
        aligned: (usize, usize),
        /// Rows and columns of the base weight.
        base: (usize, usize),
    },
    /// Vectors of another length than the product needs.
    #[error("{name} holds {values} values, not {rank}x{length}")]
    Vectors {
        /// The argument.
        name: &'static str,
        /// Values that it holds.
        values: usize,
        /// Number of vectors.
        rank: usize,
        /// Values of each.
        length: usize,
    },
    /// Hidden states that are larger than their bytes.
    #[error("{shape:?} {dtype:?} states with strides {strides:?} do not fit {bytes} bytes")]
    States {
        /// Batch, tokens, hidden.
        shape: [usize; 3],
        /// Element type.
        dtype: Dtype,
        /// Elements from row to row of the batch, and from token to token.
        strides: [usize; 2],
        /// Bytes that there are.
        bytes: usize,
    },
    /// Hidden states and reference that differ in shape or dtype.
    #[error("features are {:?} {:?} but the reference is {:?} {:?}", features.0, features.1, reference.0, reference.1)]
    Reference {
        /// Shape and dtype of the features.
        features: ([usize; 3], Dtype),
        /// Shape and dtype of the reference.
        reference: ([usize; 3], Dtype),
    },
    /// A block with other tokens than the mask.
    #[error("a block has {tokens} tokens, the mask {masked}")]
    Tokens {
        /// Tokens of the block.
        tokens: usize,
        /// Tokens of the mask.
        masked: usize,
    },
    /// Another number of gradient factors than one for each block and token.
    #[error("{factors} factors for {blocks} blocks of {tokens} tokens")]
    Factors {
        /// Factors that were given.
        factors: usize,
        /// Number of blocks.
        blocks: usize,
        /// Tokens of each block.
        tokens: usize,
    },
    /// A gradient of another size than its block.
    #[error("{factors} factors and {bytes} bytes for the gradient of {tokens} tokens and {size} bytes")]
    Gradient {
        /// Factors that were given.
        factors: usize,
        /// Bytes of the output.
        bytes: usize,
        /// Tokens of the block.
        tokens: usize,
        /// Bytes of the block.
        size: usize,
    },
}

/// Why an engine or a stream cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The CPU cannot run the level.
    #[error(transparent)]
    Level(#[from] LevelError),
    /// The system refuses the threads of a pool.
    #[error("cannot start {threads} threads: {source}")]
    Pool {
        /// Threads that were asked for.
        threads: usize,
        /// What the system says.
        source: rayon::ThreadPoolBuildError,
    },
    /// The system refuses a single thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}
