//! Which lines of a JSONL file are certainly rows of text or turns, found in one pass on several threads.

mod row;

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use memchr::{memchr, memchr_iter};

/// Bytes at a time: enough that threads seldom meet, little enough that they end together.
const PIECE: usize = 1 << 18;

/// Where the lines start that are not certainly rows, in order; lines of blanks do not count.
///
/// A row has `messages` (turns), or `prompt` and `completion` (both text, or both turns), and neither `tools` nor both kinds. Turns
/// are not empty; each has one `role` that is known, one `content` of text, and no `tool_calls`. Other fields may be anything
/// that is JSON. What this says of a line that it does not take is nothing but that somebody should look at it: numbers beyond
/// float64, halves of surrogate pairs, fields that come twice and deep nesting are among those.
#[must_use]
pub fn odd_rows(content: &[u8], threads: usize) -> Vec<usize> {
    let pieces = content.len().div_ceil(PIECE);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut found = Vec::new();
        loop {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= pieces {
                return found;
            }
            look(content, piece * PIECE, ((piece + 1) * PIECE).min(content.len()), &mut found);
        }
    };
    let mut found = thread::scope(|scope| {
        let wanted = threads.min(pieces).max(1);
        // A thread that the system does not give is done without.
        let others: Vec<_> =
            (1..wanted).filter_map(|_| thread::Builder::new().spawn_scoped(scope, work).ok()).collect();
        let mut found = work();
        for other in others {
            found.append(&mut other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        found
    });
    found.sort_unstable();
    found
}

/// Look at the lines that start in a piece; the last may end beyond it.
fn look(content: &[u8], first: usize, last: usize, found: &mut Vec<usize>) {
    let mut start = first;
    if first > 0 {
        match memchr(b'\n', &content[first - 1..last - 1]) {
            Some(end) => start = first + end,
            None => return,
        }
    }
    let begin = start;
    for end in memchr_iter(b'\n', &content[begin..]).map(|end| end + begin).chain([content.len()]) {
        let line = &content[start..end];
        if !is_blank(line) && !row::is_row(line) {
            found.push(start);
        }
        start = end + 1;
        if start >= last {
            return;
        }
    }
}

fn is_blank(line: &[u8]) -> bool {
    line.iter().all(|byte| matches!(byte, b' ' | b'\t'..=b'\r'))
}
