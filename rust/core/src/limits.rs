//! What this machine can read and multiply: the limits that the speed of the kernels is judged by.

use std::time::Instant;

use crate::kernels::{Level, fused_chains, prefetch};

/// Bytes that one thread reads of a region before it turns to the next region.
const STRETCH: usize = 1 << 14;
/// Distance of the software prefetch, in bytes.
const AHEAD: usize = 1 << 12;
/// Fused multiply-adds in one lane of one chain, in `fma_peak`.
const STEPS: usize = 1 << 22;

/// Seconds to read every byte of `regions` once with `threads` threads that only fold what they read.
///
/// Each thread takes a contiguous share of every region and reads the regions in turn, as the kernels do with the two
/// weights.
#[must_use]
pub fn read_seconds(regions: &[&[u8]], threads: usize) -> f64 {
    at_once(threads, |thread, threads| {
        let shares: Vec<&[u8]> = regions
            .iter()
            .map(|region| {
                let edge = |index: usize| region.len() / threads * index;
                let end = if thread + 1 == threads { region.len() } else { edge(thread + 1) };
                &region[edge(thread)..end]
            })
            .collect();
        let longest = shares.iter().map(|share| share.len()).max().unwrap_or(0);
        let mut folded = 0;
        for start in (0..longest).step_by(STRETCH) {
            for share in &shares {
                let stretch = &share[start.min(share.len())..(start + STRETCH).min(share.len())];
                folded ^= fold(stretch);
            }
        }
        std::hint::black_box(folded);
    })
}

/// Fused multiply-add rate of `threads` threads at `level` on registers alone, in FLOP/s (two for each multiply-add).
///
/// # Panics
/// When this CPU lacks the level.
#[must_use]
pub fn fma_peak(threads: usize, level: Level) -> f64 {
    assert!(level.is_available(), "this CPU has no {}", level.name());
    let lanes = std::sync::atomic::AtomicUsize::new(0);
    let seconds = at_once(threads, |_, _| {
        lanes.fetch_add(fused_chains(level, STEPS), std::sync::atomic::Ordering::Relaxed);
    });
    2.0 * STEPS as f64 * lanes.into_inner() as f64 / seconds
}

/// Seconds from the moment when all threads are ready to the end of the last one's work.
fn at_once(threads: usize, work: impl Fn(usize, usize) + Sync) -> f64 {
    let threads = threads.max(1);
    let barrier = std::sync::Barrier::new(threads);
    let (work, barrier) = (&work, &barrier);
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || {
                    barrier.wait();
                    let start = Instant::now();
                    work(thread, threads);
                    (start, Instant::now())
                })
            })
            .collect();
        let times: Vec<_> = handles.into_iter().filter_map(|handle| handle.join().ok()).collect();
        let start = times.iter().map(|(start, _)| *start).min();
        let end = times.iter().map(|(_, end)| *end).max();
        start.zip(end).map_or(0.0, |(start, end)| (end - start).as_secs_f64())
    })
}

fn fold(bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if Level::detect() >= Level::Avx2 {
        // SAFETY: the CPU has AVX2.
        return unsafe { fold_avx2(bytes) };
    }
    fold_any(bytes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn fold_avx2(bytes: &[u8]) -> u64 {
    fold_any(bytes)
}

#[allow(clippy::inline_always)] // so that it takes on the caller's instruction set
#[inline(always)]
fn fold_any(bytes: &[u8]) -> u64 {
    let mut lanes = [0_u64; 16];
    let (chunks, rest) = bytes.as_chunks::<128>();
    for chunk in chunks {
        prefetch(chunk.as_ptr().wrapping_add(AHEAD));
        prefetch(chunk.as_ptr().wrapping_add(AHEAD + 64));
        for (lane, word) in lanes.iter_mut().zip(chunk.as_chunks::<8>().0) {
            *lane ^= u64::from_ne_bytes(*word);
        }
    }
    lanes.iter().fold(0, |sum, lane| sum ^ lane) ^ rest.iter().fold(0, |sum, byte| sum ^ u64::from(*byte))
}
