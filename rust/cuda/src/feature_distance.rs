//! Launches of the feature distance and its gradient.

use crate::argument::{int, long};
use crate::device::Grid;
use crate::{Cuda, CudaError, Dtype, Source};

/// Most layers of one launch, as in the kernels' source.
const LAYERS: usize = 48;
/// Tokens per block of threads, as in the kernels' source.
const WARPS: usize = 8;
/// Bytes of one load.
const WIDE: usize = 16;

/// What is scaled to unit length before the distance is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Normalize {
    /// The tokens of a sequence, flattened.
    Sequence,
    /// Each token.
    Token,
    /// Nothing.
    None,
}

/// Hidden states of one layer, and of the reference model: [batch, tokens, hidden] with a contiguous hidden axis.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    /// Element type of both.
    pub dtype: Dtype,
    /// Elements of a token.
    pub hidden: usize,
    /// Address of the features.
    pub features: usize,
    /// Address of the reference.
    pub reference: usize,
    /// Elements from one batch row to the next, and from one token to the next, in the features.
    pub features_strides: [usize; 2],
    /// Same for the reference.
    pub reference_strides: [usize; 2],
}

/// The tokens that count, and how they form sequences.
#[derive(Clone, Copy, Debug)]
pub struct Tokens {
    /// Batch rows, and tokens per row.
    pub shape: [usize; 2],
    /// Address of one byte per token; zero if the token does not count.
    pub mask: usize,
    /// Bytes from one batch row to the next, and from one token to the next.
    pub mask_strides: [usize; 2],
    /// None: each batch row is one sequence.
    pub packing: Option<Packing>,
}

/// Addresses of int32 arrays that define the sequences of a batch row.
#[derive(Clone, Copy, Debug)]
pub struct Packing {
    /// [batch, tokens]: the tokens of a batch row, sequence after sequence, then those that do not count.
    pub order: usize,
    /// [batch, tokens + 1]: where the sequences start in that order, then where the last one ends.
    pub starts: usize,
    /// [batch]: number of sequences.
    pub counts: usize,
}

/// Addresses of the forward's outputs.
#[derive(Clone, Copy, Debug)]
pub struct Results {
    /// float64 [layers, batch, tokens, 3], scratch.
    pub sums: usize,
    /// float32 [layers, batch, tokens, 2]: factors of each token's gradient, before the mean over sequences.
    pub factors: usize,
    /// float64 [layers, batch], scratch.
    pub distances: usize,
    /// int32 [batch], scratch.
    pub sequences: usize,
    /// float32: 1 / number of sequences.
    pub share: usize,
    /// float32: the distance.
    pub distance: usize,
}

/// Same as `Layer` in the kernels' source.
#[repr(C)]
#[derive(Clone, Copy)]
struct Layer {
    features: usize,
    reference: usize,
    gradient: usize,
    features_strides: [i64; 2],
    reference_strides: [i64; 2],
    hidden: i32,
    aligned: i32,
}

/// Same as `Tokens` in the kernels' source.
#[repr(C)]
#[derive(Clone, Copy)]
struct TokensArgument {
    mask: usize,
    mask_strides: [i64; 2],
    order: usize,
    starts: usize,
    counts: usize,
    batch: i32,
    tokens: i32,
}

impl Cuda {
    /// Computes the sum over layers and the mean over sequences of the squared distance on `stream`. Layers of the same
    /// dtype are read in one launch, up to 48 at a time.
    ///
    /// # Safety
    /// Every address points to device memory with the described number of elements. The memory stays valid, and nothing
    /// else writes to it, until the stream has run the launches.
    ///
    /// # Errors
    /// If operands are too large, or the kernels cannot be compiled, loaded or launched.
    pub unsafe fn feature_distance(
        &self,
        device: i32,
        stream: usize,
        pairs: &[Pair],
        tokens: Tokens,
        normalize: Normalize,
        results: Results,
    ) -> Result<(), CudaError> {
        let launches = Launch::all(pairs.iter().map(|pair| (pair, 0)))?;
        let argument = tokens.argument()?;
        let device = self.device(device)?;
        let library = self.library(&device, Source::FeatureDistance)?;
        let [batch, length] = tokens.shape;
        let layers = int("layers", pairs.len())?;
        let Results { sums, factors, distances, sequences, share, distance } = results;
        device.on_stream(self.driver(), stream, |stream| {
            for launch in launches {
                let grid =
                    Grid { blocks: ((batch * length).div_ceil(WARPS), launch.count), threads: 32 * WARPS as u32 };
                // SAFETY: Layers, Tokens, int and Sums*; addresses are valid by this function's contract.
                unsafe {
                    let name = format!("token_sums_{}", launch.dtype.name());
                    stream.launch(&library, &name, grid, (launch.layers, argument, launch.first, sums))?;
                }
            }
            let grid = Grid { blocks: (batch, pairs.len()), threads: 128 };
            let parameters = (argument, normalize as i32, sums, factors, distances, sequences);
            // SAFETY: Tokens, int, Sums*, Factor*, double* and int*; addresses are valid by this function's contract.
            unsafe { stream.launch(&library, "sequence_factors", grid, parameters)? };
            let grid = Grid { blocks: (1, 1), threads: 32 };
            let parameters = (layers, argument.batch, distances, sequences, share, distance);
            // SAFETY: int, int, double*, int*, float* and float*; addresses are valid by this function's contract.
            unsafe { stream.launch(&library, "total_distance", grid, parameters) }
        })
    }

    /// Writes `weight` (the address of one float32) times the gradient in the features of each layer to `gradients` on
    /// `stream`. These are addresses of contiguous memory with the layers' shape and dtype.
    ///
    /// # Safety
    /// As [`Cuda::feature_distance`]; `factors` is the address of float32 [layers, batch, tokens, 2].
    ///
    /// # Errors
    /// As [`Cuda::feature_distance`].
    #[allow(clippy::too_many_arguments, reason = "what the forward was given and what it wrote")]
    pub unsafe fn feature_distance_gradient(
        &self,
        device: i32,
        stream: usize,
        pairs: &[Pair],
        gradients: &[usize],
        shape: [usize; 2],
        factors: usize,
        weight: usize,
    ) -> Result<(), CudaError> {
        if pairs.len() != gradients.len() {
            return Err(CudaError::Operands(format!("{} layers, but {} gradients", pairs.len(), gradients.len())));
        }
        let launches = Launch::all(pairs.iter().zip(gradients.iter().copied()))?;
        let [batch, length] = [int("rows of the batch", shape[0])?, int("tokens of a row", shape[1])?];
        let device = self.device(device)?;
        let library = self.library(&device, Source::FeatureDistance)?;
        device.on_stream(self.driver(), stream, |stream| {
            for launch in launches {
                let blocks = ((shape[0] * shape[1]).div_ceil(WARPS), launch.count);
                let grid = Grid { blocks, threads: 32 * WARPS as u32 };
                let name = format!("gradient_{}", launch.dtype.name());
                let parameters = (launch.layers, batch, length, launch.first, factors, weight);
                // SAFETY: Layers, int, int, int, Factor* and float*; addresses are valid by this function's contract.
                unsafe { stream.launch(&library, &name, grid, parameters)? };
            }
            Ok(())
        })
    }
}

/// Adjacent layers of the same dtype, read in one launch.
struct Launch {
    dtype: Dtype,
    layers: [Layer; LAYERS],
    /// Index of the first one among all layers.
    first: i32,
    count: usize,
}

impl Launch {
    /// Makes the launches for pairs and the addresses of their gradients.
    fn all<'a>(pairs: impl Iterator<Item = (&'a Pair, usize)>) -> Result<Vec<Self>, CudaError> {
        let mut launches: Vec<Self> = Vec::new();
        for (index, (pair, gradient)) in pairs.enumerate() {
            let layer = Layer::new(pair, gradient)?;
            match launches.last_mut() {
                Some(last) if last.dtype == pair.dtype && last.count < LAYERS => {
                    last.layers[last.count] = layer;
                    last.count += 1;
                }
                _ => launches.push(Self {
                    dtype: pair.dtype,
                    layers: [layer; LAYERS],
                    first: int("layers", index)?,
                    count: 1,
                }),
            }
        }
        Ok(launches)
    }
}

impl Layer {
    fn new(pair: &Pair, gradient: usize) -> Result<Self, CudaError> {
        let size = pair.dtype.size();
        let hidden = int("elements of a token", pair.hidden)?;
        if pair.hidden.checked_mul(size).is_none_or(|bytes| i32::try_from(bytes).is_err()) {
            return Err(CudaError::Operands(format!("{hidden} elements of a token are more than a kernel can count")));
        }
        let strides = pair.features_strides.iter().chain(&pair.reference_strides);
        let mut steps =
            strides.map(|stride| stride.wrapping_mul(size)).chain([pair.features, pair.reference, gradient]);
        // The gradient is contiguous: its tokens are 16-byte aligned if a token's size is a multiple of 16 bytes.
        let whole = gradient == 0 || (pair.hidden * size).is_multiple_of(WIDE);
        let aligned = whole && steps.all(|step| step.is_multiple_of(WIDE));
        Ok(Self {
            features: pair.features,
            reference: pair.reference,
            gradient,
            features_strides: long(pair.features_strides)?,
            reference_strides: long(pair.reference_strides)?,
            hidden,
            aligned: i32::from(aligned),
        })
    }
}

impl Tokens {
    fn argument(self) -> Result<TokensArgument, CudaError> {
        let [batch, tokens] = self.shape;
        let packing = self.packing.unwrap_or(Packing { order: 0, starts: 0, counts: 0 });
        Ok(TokensArgument {
            mask: self.mask,
            mask_strides: long(self.mask_strides)?,
            order: packing.order,
            starts: packing.starts,
            counts: packing.counts,
            batch: int("rows of the batch", batch)?,
            tokens: int("tokens of a row", tokens)?,
        })
    }
}

pub(crate) fn kernels() -> Vec<String> {
    let of_dtypes = ["token_sums", "gradient"]
        .into_iter()
        .flat_map(|kernel| Dtype::ALL.into_iter().map(move |dtype| format!("{kernel}_{}", dtype.name())));
    of_dtypes.chain(["sequence_factors", "total_distance"].map(str::to_owned)).collect()
}
