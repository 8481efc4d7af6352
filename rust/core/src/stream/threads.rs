//! The number of threads to use.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The environment variable that sets the number of threads.
pub const THREADS_VARIABLE: &str = "SAFELORA_FAST_NUM_THREADS";

/// More threads gain nothing: they share the machine's memory bandwidth.
const MOST: usize = 64;

/// Number of threads available to this process; zero means not yet determined. The system call takes longer than a
/// small kernel. There is no lock, because a fork could leave it locked.
static AVAILABLE: AtomicUsize = AtomicUsize::new(0);

/// A value of the environment variable that is not a valid number of threads.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{THREADS_VARIABLE} is {0:?}; use a whole number from 1 to {MOST}")]
pub struct ThreadsError(pub String);

/// The number of threads in `SAFELORA_FAST_NUM_THREADS`, or else the number available to this process.
///
/// # Errors
/// If the variable is not a number from 1 to 64.
pub fn default_threads() -> Result<usize, ThreadsError> {
    match std::env::var_os(THREADS_VARIABLE).filter(|word| !word.is_empty()) {
        Some(word) => parse(&word.to_string_lossy()),
        None => Ok(available()),
    }
}

fn available() -> usize {
    let known = AVAILABLE.load(Ordering::Relaxed);
    if known > 0 {
        return known;
    }
    let available = std::thread::available_parallelism().map_or(1, usize::from).min(MOST);
    AVAILABLE.store(available, Ordering::Relaxed);
    available
}

fn parse(word: &str) -> Result<usize, ThreadsError> {
    let number = word.trim().parse().ok().filter(|number| (1..=MOST).contains(number));
    number.ok_or_else(|| ThreadsError(word.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_numbers_of_threads() {
        assert_eq!(parse("1"), Ok(1));
        assert_eq!(parse(" 64 "), Ok(64));
        for word in ["0", "65", "two", "-1"] {
            assert_eq!(parse(word), Err(ThreadsError(word.to_owned())));
        }
    }
}
