//! The gradient: reads both tensors once, writes once.

use super::element::{Bf16, Element, F16, F32};
use super::formula::Factor;
use super::rows::Rows;
use super::states::Pair;
use crate::kernels::{Dtype, Engine, ShapeError, at_level};

/// Gradients of at least this many bytes bypass the caches, because they would be evicted before they are read.
const STREAM: usize = 1 << 20;
/// Alignment that streaming stores need.
const LINE: usize = 64;

/// One layer for which to compute the gradient.
#[derive(Debug)]
pub struct Gradient<'a> {
    /// The layer.
    pub block: Pair<'a>,
    /// The output of `forward` for each token of the layer.
    pub factors: &'a [Factor],
    /// The gradient, in the dtype of the layer, contiguous.
    pub output: &'a mut [u8],
}

/// Writes `weight` times the gradient of `forward`'s result with respect to the features of each layer. Tokens that do
/// not count get zeros and are not read.
///
/// # Errors
/// If the length of factors or output does not match the layer. Then nothing is written.
pub fn backward(engine: &Engine, gradients: &mut [Gradient<'_>], weight: f64) -> Result<(), ShapeError> {
    let mut bytes = 0;
    for Gradient { block, factors, output } in &*gradients {
        let (rows, size) = (block.rows(), block.rows() * block.row_size());
        if factors.len() != rows || output.len() != size {
            let (factors, bytes) = (factors.len(), output.len());
            return Err(ShapeError::Gradient { factors, bytes, tokens: rows, size });
        }
        bytes += size;
    }
    let mut units = Vec::new();
    for Gradient { block, factors, output } in gradients {
        let (row_size, size) = (block.row_size(), block.unit());
        if row_size == 0 {
            continue;
        }
        let aligned = output.as_ptr().addr().is_multiple_of(LINE) && row_size.is_multiple_of(LINE);
        let stream = aligned && bytes >= STREAM;
        for (index, (factors, output)) in factors.chunks(size).zip(output.chunks_mut(size * row_size)).enumerate() {
            units.push(Unit { block, first: index * size, factors, output, stream });
        }
    }
    let level = engine.level();
    engine.share(units, |unit| at_level!(level, Unit::run, (unit, weight)));
    Ok(())
}

/// Adjacent tokens of a layer.
struct Unit<'a> {
    block: &'a Pair<'a>,
    first: usize,
    factors: &'a [Factor],
    output: &'a mut [u8],
    stream: bool,
}

impl Unit<'_> {
    fn run<L: Rows>(self, weight: f64) {
        match self.block.dtype() {
            Dtype::F32 => self.differentiate::<L, F32>(weight),
            Dtype::Bf16 => self.differentiate::<L, Bf16>(weight),
            Dtype::F16 => self.differentiate::<L, F16>(weight),
        }
    }

    fn differentiate<L: Rows, E: Element>(self, weight: f64) {
        let outputs = self.output.chunks_mut(self.block.row_size());
        for (([features, reference], factor), output) in
            self.block.tokens_from(self.first).zip(self.factors).zip(outputs)
        {
            let scaled = factor.times(weight);
            if factor.scale == 0.0 || scaled.scale == 0.0 {
                output.fill(0);
                continue;
            }
            // SAFETY: the engine has checked the CPU; `stream` is set only if outputs are aligned.
            unsafe {
                if self.stream {
                    L::differentiate::<E, true>(features, reference, scaled, output);
                } else {
                    L::differentiate::<E, false>(features, reference, scaled, output);
                }
            }
        }
        // SAFETY: the engine has checked the CPU.
        unsafe { L::fence() }
    }
}
