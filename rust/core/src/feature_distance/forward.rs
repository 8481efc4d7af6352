//! The distance: reads both tensors once.

use super::element::{Bf16, Element, F16, F32};
use super::formula::{Factor, Normalize, Sums};
use super::rows::Rows;
use super::sequences::{NONE, Sequences};
use super::states::Pair;
use crate::kernels::{Dtype, Engine, ShapeError, at_level};

/// Returns the sum over layers and the mean over sequences of the squared distance; zero if there is no sequence.
///
/// Writes to `factors`, for each layer and token, the factors of the gradient of the result. Tokens that do not count
/// get zeros and are not read.
///
/// # Errors
/// If a layer does not have the tokens of `sequences`, or `factors` has the wrong length.
pub fn forward(
    engine: &Engine,
    blocks: &[Pair<'_>],
    sequences: &Sequences,
    normalize: Normalize,
    factors: &mut [Factor],
) -> Result<f64, ShapeError> {
    let rows = sequences.of_token.len();
    if let Some(block) = blocks.iter().find(|block| block.rows() != rows) {
        return Err(ShapeError::Tokens { tokens: block.rows(), masked: rows });
    }
    if factors.len() != blocks.len() * rows {
        return Err(ShapeError::Factors { factors: factors.len(), blocks: blocks.len(), tokens: rows });
    }
    if rows == 0 || sequences.count() == 0 {
        factors.fill(Factor::default());
        return Ok(0.0);
    }
    let share = 1.0 / sequences.count() as f64;
    let mut kept = vec![Sums::default(); factors.len()];
    let mut units = Vec::new();
    let per_block = blocks.iter().zip(kept.chunks_mut(rows)).zip(factors.chunks_mut(rows));
    for ((block, kept), factors) in per_block {
        let size = block.unit();
        for (index, (kept, factors)) in kept.chunks_mut(size).zip(factors.chunks_mut(size)).enumerate() {
            units.push(Unit { block, first: index * size, kept, factors });
        }
    }
    let level = engine.level();
    engine.share(units, |unit| at_level!(level, Unit::run, (unit, sequences, normalize, share)));

    let mut total = 0.0;
    for (kept, factors) in kept.chunks(rows).zip(factors.chunks_mut(rows)) {
        total += match normalize {
            Normalize::Sequence => distance_of_sequences(kept, factors, sequences, share),
            Normalize::Token | Normalize::None => kept.iter().map(|sums| sums.squared).sum(),
        };
    }
    Ok(total * share)
}

/// Adjacent tokens of a layer, and their results.
struct Unit<'a> {
    block: &'a Pair<'a>,
    first: usize,
    kept: &'a mut [Sums],
    factors: &'a mut [Factor],
}

impl Unit<'_> {
    fn run<L: Rows>(self, sequences: &Sequences, normalize: Normalize, share: f64) {
        match self.block.dtype() {
            Dtype::F32 => self.reduce::<L, F32>(sequences, normalize, share),
            Dtype::Bf16 => self.reduce::<L, Bf16>(sequences, normalize, share),
            Dtype::F16 => self.reduce::<L, F16>(sequences, normalize, share),
        }
    }

    /// Reduces every token that counts to its sums. If tokens are separate, stores the token's distance instead of
    /// ‖d‖².
    fn reduce<L: Rows, E: Element>(self, sequences: &Sequences, normalize: Normalize, share: f64) {
        let numbers = &sequences.of_token[self.first..];
        let tokens = self.block.tokens_from(self.first).zip(numbers);
        for (([features, reference], number), (kept, factor)) in tokens.zip(self.kept.iter_mut().zip(self.factors)) {
            *factor = Factor::default();
            if *number == NONE {
                continue;
            }
            // SAFETY: the engine has checked the CPU.
            *kept = unsafe { L::reduce::<E>(features, reference) };
            if normalize != Normalize::Sequence {
                let (distance, of_gradient) =
                    if normalize == Normalize::Token { kept.unit_distance() } else { kept.plain_distance() };
                kept.squared = distance;
                *factor = of_gradient.times(share);
            }
        }
    }
}

/// Adds up the tokens of each sequence, and writes the sequence's factors to all of its tokens.
fn distance_of_sequences(kept: &[Sums], factors: &mut [Factor], sequences: &Sequences, share: f64) -> f64 {
    let mut sums = vec![Sums::default(); sequences.count()];
    for (number, kept) in sequences.of_token.iter().zip(kept) {
        if let Some(sum) = sums.get_mut(*number as usize) {
            *sum += *kept;
        }
    }
    let distances: Vec<(f64, Factor)> = sums.into_iter().map(Sums::unit_distance).collect();
    for (number, factor) in sequences.of_token.iter().zip(factors) {
        if let Some((_, of_sequence)) = distances.get(*number as usize) {
            *factor = of_sequence.times(share);
        }
    }
    distances.iter().map(|(distance, _)| distance).sum()
}
