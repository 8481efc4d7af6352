//! Times the feature distance against the machine's read and write bandwidth, on states that have left the caches:
//! `cargo bench -p safelora-fast-core --bench feature_distance -- [hidden [megabytes ...]]`.

use std::time::Instant;

use safelora_fast_core::feature_distance::{Factor, Gradient, Normalize, Pair, Sequences, States, backward, forward};
use safelora_fast_core::kernels::{Dtype, Engine, Level};
use safelora_fast_core::limits::{read_seconds, update_seconds};

/// Memory that one round of calls covers, large enough that no call finds its tensors in a cache.
const COLD: usize = 1 << 29;
const TOKENS: usize = 64;

/// Bytes aligned to a cache line.
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

/// Median seconds of each measurement, over several rounds through the sets. The measurements alternate, because memory
/// bandwidth drifts, and each takes a set that no other used recently.
fn medians<const N: usize>(
    sets: &mut [[Bytes; 3]],
    rounds: usize,
    mut measure: impl FnMut(usize, &mut [Bytes; 3]) -> f64,
) -> [f64; N] {
    let count = sets.len();
    let mut seconds = [const { Vec::new() }; N];
    for step in 0..(rounds + 1) * count {
        for (index, seconds) in seconds.iter_mut().enumerate() {
            let taken = measure(index, &mut sets[(step + index * (count / N).max(1)) % count]);
            if step >= count {
                seconds.push(taken);
            }
        }
    }
    seconds.map(|mut seconds| {
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    })
}

fn timed(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
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
            let mut sets: Vec<_> = (0..(COLD / (3 * size)).max(5))
                .map(|set| std::array::from_fn(|index| Bytes::new(size, dtype, 3 * set + index)))
                .collect();
            let rounds = (60 / sets.len()).max(3);
            let sequences = Sequences::new([batch, TOKENS], |_, _| true, |_, _| 0);
            let mut factors = vec![Factor::default(); batch * TOKENS];
            for level in &levels {
                if std::env::var("LEVEL").is_ok_and(|word| word != level.name()) {
                    continue;
                }
                let engine = Engine::new(threads, *level).expect("the level is available");
                let [there, read, cached, streamed, back] = medians(&mut sets, rounds, |measure, [h, h0, out]| {
                    let (block, inputs) = (pair(h, h0, dtype, shape), [h.read(), h0.read()]);
                    match measure {
                        0 => timed(|| {
                            let value = forward(&engine, &[block], &sequences, Normalize::Sequence, &mut factors);
                            std::hint::black_box(value.expect("shapes fit"));
                        }),
                        1 => read_seconds(&inputs, threads),
                        2 => update_seconds(&inputs, out.write(), threads, false),
                        3 => update_seconds(&inputs, out.write(), threads, true),
                        _ => timed(|| {
                            let mut gradients = [Gradient { block, factors: &factors, output: out.write() }];
                            backward(&engine, &mut gradients, 1.0).expect("shapes fit");
                        }),
                    }
                });
                let (update, gigabytes) = (cached.min(streamed), 1e-9 * size as f64);
                println!(
                    "{dtype:?} {:5.1} MB {:7} forward {:7.3} ms, {:3.0} % of {:4.1} GB/s   backward {:7.3} ms, {:3.0} % of {:4.1} GB/s",
                    1e3 * gigabytes,
                    level.name(),
                    1e3 * there,
                    100.0 * read / there,
                    2.0 * gigabytes / read,
                    1e3 * back,
                    100.0 * update / back,
                    3.0 * gigabytes / update,
                );
            }
        }
    }
}
