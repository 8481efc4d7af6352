//! Times the products with V against the machine's read bandwidth and multiply-add rate:
//! `cargo bench -p safelora-fast-core -- [rows cols [rank ...]]`.

use std::time::Instant;

use safelora_fast_core::kernels::{Difference, Dtype, Engine, Level, Matrix};
use safelora_fast_core::limits::{fma_peak, read_seconds};

fn weights(count: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(2 * count);
    for _ in 0..count {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bytes.extend(half::bf16::from_f32((state >> 8) as f32 / 16_777_216.0 - 0.5).to_le_bytes());
    }
    bytes
}

fn fastest(rounds: usize, mut work: impl FnMut()) -> f64 {
    work();
    let seconds = (0..rounds).map(|_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    });
    seconds.fold(f64::INFINITY, f64::min)
}

fn main() {
    let threads = std::env::var("THREADS").ok().and_then(|word| word.parse().ok()).unwrap_or(2);
    let arguments: Vec<usize> = std::env::args().filter_map(|word| word.parse().ok()).collect();
    let (rows, cols, ranks): (usize, usize, &[usize]) = match arguments.as_slice() {
        [rows, cols, ranks @ ..] if !ranks.is_empty() => (*rows, *cols, ranks),
        [rows, cols, ..] => (*rows, *cols, &[4, 8, 16, 32, 64, 320]),
        _ => (4096, 4096, &[4, 8, 16, 32, 64, 320]),
    };
    let (aligned, base) = (weights(rows * cols, 1), weights(rows * cols, 2));
    let matrix = |bytes| Matrix::new(bytes, Dtype::Bf16, rows, cols, cols).expect("it fits");
    let v = Difference::new(matrix(&aligned), matrix(&base)).expect("one shape");
    let gigabytes = 4e-9 * rows as f64 * cols as f64;
    for level in Level::ALL.into_iter().rev().filter(|level| level.is_available()) {
        if std::env::var("LEVEL").is_ok_and(|word| word != level.name()) {
            continue;
        }
        let read = fastest(10, || {
            std::hint::black_box(read_seconds(&[&aligned, &base], threads));
        });
        let peak = (0..3).map(|_| fma_peak(threads, level)).fold(0.0, f64::max);
        println!("{}: reads {:.1} GB/s, {:.1} GFLOP/s", level.name(), gigabytes / read, peak * 1e-9);
        let mut engine = Engine::new(threads, level).expect("the level is available");
        for &rank in ranks {
            if level == Level::Scalar && rank > 32 {
                continue;
            }
            let left = vec![0.5_f32; rank * rows];
            let mut right = vec![0.0_f32; rank * cols];
            let mut result = vec![0.0_f32; rank * rows];
            let rounds = if level == Level::Scalar { 1 } else { 1000 / (rank + 20) + 2 };
            let transposed = fastest(rounds, || {
                engine.transposed_product(&v, &left, rank, &mut right).expect("shapes fit");
            });
            let product = fastest(rounds, || engine.product(&v, &right, rank, &mut result).expect("shapes fit"));
            let gigaflop = 2e-9 * rows as f64 * cols as f64 * rank as f64;
            println!(
                "{:7} {rows}x{cols} r {rank:3}  transposed {:8.3} ms {:6.1} GB/s {:6.1} GFLOP/s   product {:8.3} ms {:6.1} GB/s {:6.1} GFLOP/s",
                level.name(),
                transposed * 1e3,
                gigabytes / transposed,
                gigaflop / transposed,
                product * 1e3,
                gigabytes / product,
                gigaflop / product,
            );
        }
    }
}
