//! The feature distance and its gradient: from operands to launches.

use crate::argument::{int, long};
use crate::device::Grid;
use crate::{Cuda, CudaError, Dtype, Source};

/// Layers of one launch, as in the kernels' source.
const LAYERS: usize = 48;
/// Tokens of one block of threads there.
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

/// Hidden states of one layer, and those of the reference: [batch, tokens, hidden] with a contiguous hidden axis.
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
    /// Elements from row to row of the batch and from token to token, of the features.
    pub features_strides: [usize; 2],
    /// The same of the reference.
    pub reference_strides: [usize; 2],
}

/// The tokens that count, and how they form sequences.
#[derive(Clone, Copy, Debug)]
pub struct Tokens {
    /// Rows of the batch and tokens of a row.
    pub shape: [usize; 2],
    /// Address of one byte for each token; zero where it does not count.
    pub mask: usize,
    /// Bytes from row to row and from token to token.
    pub mask_strides: [usize; 2],
    /// Without, a row is a sequence.
    pub packing: Option<Packing>,
}

/// Addresses of int32 arrays that say which tokens of a row are a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Packing {
    /// [batch, tokens]: the tokens of a row, sequence after sequence, then those that do not count.
    pub order: usize,
    /// [batch, tokens + 1]: where the sequences start in that order, then where the last ends.
    pub starts: usize,
    /// [batch]: number of sequences.
    pub counts: usize,
}

/// Addresses of what the forward writes.
#[derive(Clone, Copy, Debug)]
pub struct Results {
    /// float64 [layers, batch, tokens, 3], for its own use.
    pub sums: usize,
    /// float32 [layers, batch, tokens, 2]: what the gradient of each token is made of, before the mean over sequences.
    pub factors: usize,
    /// float64 [layers, batch], for its own use.
    pub distances: usize,
    /// int32 [batch], for its own use.
    pub sequences: usize,
    /// float32: one divided by the number of sequences.
    pub share: usize,
    /// float32: the distance.
    pub distance: usize,
}

/// As `Layer` in the kernels' source.
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

/// As `Tokens` in the kernels' source.
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
    /// Puts the sum over layers and the mean over sequences of the squared distance on `stream`. The layers of one dtype are read in
    /// one launch, 48 at a time.
    ///
    /// # Safety
    /// Every address is that of as many elements on the device as its description says, which stay valid until the stream has come
    /// this far, and which nothing else writes meanwhile.
    ///
    /// # Errors
    /// When operands are too large, or the kernels cannot be compiled, loaded or launched.
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
                // SAFETY: the parameters are Layers, Tokens, int and Sums*; the caller vouches for the addresses.
                unsafe {
                    let name = format!("token_sums_{}", launch.dtype.name());
                    stream.launch(&library, &name, grid, (launch.layers, argument, launch.first, sums))?;
                }
            }
            let grid = Grid { blocks: (batch, pairs.len()), threads: 128 };
            let parameters = (argument, normalize as i32, sums, factors, distances, sequences);
            // SAFETY: the parameters are Tokens, int, Sums*, Factor*, double* and int*; the caller vouches for the addresses.
            unsafe { stream.launch(&library, "sequence_factors", grid, parameters)? };
            let grid = Grid { blocks: (1, 1), threads: 32 };
            let parameters = (layers, argument.batch, distances, sequences, share, distance);
            // SAFETY: the parameters are int, int, double*, int*, float* and float*; the caller vouches for the addresses.
            unsafe { stream.launch(&library, "total_distance", grid, parameters) }
        })
    }

    /// Puts `weight` (the address of one float32) times the gradient in the features of each layer on `stream`, to `gradients`:
    /// addresses of memory of the layers' shape and dtype, contiguous.
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
                // SAFETY: the parameters are Layers, int, int, int, Factor* and float*; the caller vouches for the addresses.
                unsafe { stream.launch(&library, &name, grid, parameters)? };
            }
            Ok(())
        })
    }
}

/// Neighboring layers of one dtype, that are read in one launch.
struct Launch {
    dtype: Dtype,
    layers: [Layer; LAYERS],
    /// Place of the first among all layers.
    first: i32,
    count: usize,
}

impl Launch {
    /// The launches for pairs and the addresses of their gradients.
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
        // The gradient is contiguous: its tokens start at a multiple of 16 bytes where its size is one.
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
