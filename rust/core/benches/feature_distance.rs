//! Times the feature distance beside what the machine can read and write, over states that have left the caches:
//! `cargo bench -p safelora-fast-core --bench feature_distance -- [hidden [megabytes ...]]`.

use std::time::Instant;

use safelora_fast_core::feature_distance::{Factor, Gradient, Normalize, Pair, Sequences, States, backward, forward};
use safelora_fast_core::kernels::{Dtype, Engine, Level};
use safelora_fast_core::limits::{read_seconds, update_seconds};

/// Memory that a round of calls goes through, so that no call finds its tensors in a cache.
const COLD: usize = 1 << 29;
const TOKENS: usize = 64;

/// Bytes that begin on a cache line.
struct Bytes {
    memory: Vec<u8>,
    start: usize,
    size: usize,
}

impl Bytes {
    fn new(size: usize, dtype: Dtype, seed: usize) -> Self {
        let mut state = seed as u32;
        let mut memory = vec![0_u8; size + 64];
        let start = memory.as_ptr().align_offset(64);
        for value in memory[start..start + size].chunks_exact_mut(dtype.size()) {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let number = (state >> 8) as f32 / 16_777_216.0 - 0.5;
            match dtype {
                Dtype::F32 => value.copy_from_slice(&number.to_le_bytes()),
                Dtype::Bf16 => value.copy_from_slice(&half::bf16::from_f32(number).to_le_bytes()),
                Dtype::F16 => value.copy_from_slice(&half::f16::from_f32(number).to_le_bytes()),
            }
        }
        Self { memory, start, size }
    }

    fn read(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.size]
    }

    fn write(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.size]
    }
}

/// Median of the seconds that `work` gives or takes for each of the sets, over some rounds.
fn median(sets: &mut [[Bytes; 3]], rounds: usize, mut work: impl FnMut(&mut [Bytes; 3]) -> Option<f64>) -> f64 {
    let mut seconds = Vec::new();
    for round in 0..=rounds {
        for set in &mut *sets {
            let start = Instant::now();
            let given = work(set);
            let taken = start.elapsed().as_secs_f64();
            if round > 0 {
                seconds.push(given.unwrap_or(taken));
            }
        }
    }
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn pair<'a>(features: &'a Bytes, reference: &'a Bytes, dtype: Dtype, shape: [usize; 3]) -> Pair<'a> {
    let strides = [shape[1] * shape[2], shape[2]];
    let [features, reference] =
        [features, reference].map(|bytes| States::new(bytes.read(), dtype, shape, strides).expect("it fits"));
    Pair::new(features, reference).expect("one shape")
}

fn main() {
    let threads = std::env::var("THREADS").ok().and_then(|word| word.parse().ok()).unwrap_or(2);
    let arguments: Vec<usize> = std::env::args().filter_map(|word| word.parse().ok()).collect();
    let (hidden, sizes): (usize, &[usize]) = match arguments.as_slice() {
        [hidden, sizes @ ..] if !sizes.is_empty() => (*hidden, sizes),
        [hidden] => (*hidden, &[1, 4, 16, 64]),
        [] => (576, &[1, 4, 16, 64]),
        [..] => unreachable!("a slice has some length"),
    };
    let levels: Vec<Level> = Level::ALL.into_iter().rev().filter(|level| level.is_available()).collect();
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        for megabytes in sizes {
            let batch = ((megabytes << 20) / (TOKENS * hidden * dtype.size())).max(1);
            let shape = [batch, TOKENS, hidden];
            let size = batch * TOKENS * hidden * dtype.size();
            let mut sets: Vec<_> = (0..(COLD / (3 * size)).max(2))
                .map(|set| std::array::from_fn(|index| Bytes::new(size, dtype, 3 * set + index)))
                .collect();
            let rounds = if sets.len() > 20 { 3 } else { 20 };
            let read = median(&mut sets, rounds, |[h, h0, _]| Some(read_seconds(&[h.read(), h0.read()], threads)));
            let [cached, streamed] = [false, true].map(|stream| {
                median(&mut sets, rounds, |[h, h0, out]| {
                    Some(update_seconds(&[h.read(), h0.read()], out.write(), threads, stream))
                })
            });
            let update = cached.min(streamed);
            println!(
                "{dtype:?} {:.1} MB: reads {:.1} GB/s, updates {:.1} GB/s ({:.1} cached, {:.1} streamed)",
                1e-6 * size as f64,
                2e-9 * size as f64 / read,
                3e-9 * size as f64 / update,
                3e-9 * size as f64 / cached,
                3e-9 * size as f64 / streamed,
            );
            let sequences = Sequences::new([batch, TOKENS], |_, _| true, |_, _| 0);
            let mut factors = vec![Factor::default(); batch * TOKENS];
            for level in &levels {
                if std::env::var("LEVEL").is_ok_and(|word| word != level.name()) {
                    continue;
                }
                let engine = Engine::new(threads, *level).expect("the level is available");
                let rounds = if *level == Level::Scalar { 1 } else { rounds };
                let there = median(&mut sets, rounds, |[h, h0, _]| {
                    let blocks = [pair(h, h0, dtype, shape)];
                    let value = forward(&engine, &blocks, &sequences, Normalize::Sequence, &mut factors);
                    std::hint::black_box(value.expect("shapes fit"));
                    None
                });
                let back = median(&mut sets, rounds, |[h, h0, out]| {
                    let block = pair(h, h0, dtype, shape);
                    let mut gradients = [Gradient { block, factors: &factors, output: out.write() }];
                    backward(&engine, &mut gradients, 1.0).expect("shapes fit");
                    None
                });
                println!(
                    "  {:7} forward {:8.3} ms {:3.0} %   backward {:8.3} ms {:3.0} %",
                    level.name(),
                    1e3 * there,
                    100.0 * read / there,
                    1e3 * back,
                    100.0 * update / back,
                );
            }
        }
    }
}
