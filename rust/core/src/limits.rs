//! The machine's read bandwidth and multiply-add rate: limits for judging the speed of the kernels.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::kernels::{Level, fused_chains, prefetch};

/// Bytes that one thread reads of a region before it switches to the next region.
const STRETCH: usize = 1 << 14;
/// Same as `STRETCH` if a region is also written: memory is faster with shorter turns of reading and writing.
const UPDATE_STRETCH: usize = 1 << 12;
/// Prefetch distance in bytes.
const AHEAD: usize = 1 << 12;
/// Fused multiply-adds in one lane of one chain, in `fma_peak`.
const STEPS: usize = 1 << 22;

/// Seconds to read every byte of `regions` once with `threads` threads that only fold the data.
///
/// Each thread takes a contiguous share of every region and alternates between the regions, as the kernels do with the
/// two weights.
#[must_use]
pub fn read_seconds(regions: &[&[u8]], threads: usize) -> f64 {
    update_seconds(regions, &mut [], threads, false)
}

/// Seconds to read every byte of `regions` and overwrite every byte of `written` once, like `read_seconds`.
/// `stream` bypasses the caches.
pub fn update_seconds(regions: &[&[u8]], written: &mut [u8], threads: usize, stream: bool) -> f64 {
    let threads = threads.max(1);
    let stretch = if written.is_empty() { STRETCH } else { UPDATE_STRETCH };
    let size = written.len().div_ceil(threads).max(1);
    let mut parts: Vec<&mut [u8]> = written.chunks_mut(size).collect();
    parts.resize_with(threads, Default::default);
    let parts: Vec<_> = parts.into_iter().map(Mutex::new).collect();
    at_once(threads, |thread, threads| {
        let shares: Vec<&[u8]> = regions
            .iter()
            .map(|region| {
                let edge = |index: usize| region.len() / threads * index;
                let end = if thread + 1 == threads { region.len() } else { edge(thread + 1) };
                &region[edge(thread)..end]
            })
            .collect();
        let mut part = parts[thread].lock().unwrap_or_else(PoisonError::into_inner);
        let longest = shares.iter().map(|share| share.len()).max().unwrap_or(0).max(part.len());
        let mut folded = 0;
        for start in (0..longest).step_by(stretch) {
            for share in &shares {
                folded ^= fold(&share[start.min(share.len())..(start + stretch).min(share.len())]);
            }
            let end = (start + stretch).min(part.len());
            overwrite(&mut part[start.min(end)..end], folded as u8, stream);
        }
        fence();
        std::hint::black_box(folded);
    })
}

/// Fused multiply-add rate of `threads` threads at `level` in registers only, in FLOP/s (two per multiply-add).
///
/// # Panics
/// If this CPU lacks the level.
#[must_use]
pub fn fma_peak(threads: usize, level: Level) -> f64 {
    assert!(level.is_available(), "this CPU has no {}", level.name());
    let lanes = std::sync::atomic::AtomicUsize::new(0);
    let seconds = at_once(threads, |_, _| {
        lanes.fetch_add(fused_chains(level, STEPS), std::sync::atomic::Ordering::Relaxed);
    });
    2.0 * STEPS as f64 * lanes.into_inner() as f64 / seconds
}

/// Seconds from the moment all threads are ready until the last one finishes.
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

#[allow(clippy::inline_always)] // lets it use the caller's instruction set
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

/// Fills `bytes`, bypassing the caches if `stream` is set and the CPU can; then a `fence` must follow.
fn overwrite(bytes: &mut [u8], value: u8, stream: bool) {
    #[cfg(target_arch = "x86_64")]
    if stream {
        // SAFETY: the level is checked; SSE2 is part of x86-64.
        return unsafe {
            if Level::detect() >= Level::Avx512 { stream_avx512(bytes, value) } else { stream_sse2(bytes, value) }
        };
    }
    let _ = stream;
    bytes.fill(value);
}

/// Orders streaming stores before all later stores.
fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
fn stream_avx512(bytes: &mut [u8], value: u8) {
    use std::arch::x86_64::{__m512i, _mm512_set1_epi8, _mm512_stream_si512};
    // SAFETY: any bytes form a register, and `body` is aligned to it; the caller fences.
    unsafe {
        let (head, body, tail) = bytes.align_to_mut::<__m512i>();
        head.fill(value);
        for register in body {
            _mm512_stream_si512(register, _mm512_set1_epi8(value.cast_signed()));
        }
        tail.fill(value);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse2")]
fn stream_sse2(bytes: &mut [u8], value: u8) {
    use std::arch::x86_64::{__m128i, _mm_set1_epi8, _mm_stream_si128};
    // SAFETY: any bytes form a register, and `body` is aligned to it; the caller fences.
    unsafe {
        let (head, body, tail) = bytes.align_to_mut::<__m128i>();
        head.fill(value);
        for register in body {
            _mm_stream_si128(register, _mm_set1_epi8(value.cast_signed()));
        }
        tail.fill(value);
    }
}
