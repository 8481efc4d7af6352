//! The sequence of every token.

use std::collections::HashMap;

/// Marks a token that does not count, and so has no sequence.
pub(super) const NONE: u32 = u32::MAX;

/// The sequence of every token of a batch, numbered in the order of their first tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequences {
    pub(super) of_token: Vec<u32>,
    count: usize,
}

impl Sequences {
    /// Groups tokens that count into sequences by row and segment. `counts` and `segment` are called with row and
    /// token.
    pub fn new(
        [batch, tokens]: [usize; 2],
        counts: impl Fn(usize, usize) -> bool,
        segment: impl Fn(usize, usize) -> i64,
    ) -> Self {
        let mut of_token = Vec::with_capacity(batch * tokens);
        let mut count = 0;
        let mut known = HashMap::new();
        for row in 0..batch {
            known.clear();
            let mut last = None;
            for token in 0..tokens {
                if !counts(row, token) {
                    of_token.push(NONE);
                    continue;
                }
                let segment = segment(row, token);
                let number = match last {
                    Some((same, number)) if same == segment => number,
                    _ => *known.entry(segment).or_insert_with(|| {
                        count += 1;
                        count - 1
                    }),
                };
                last = Some((segment, number));
                of_token.push(number);
            }
        }
        Self { of_token, count: count as usize }
    }

    /// Number of sequences.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_segments_tell_sequences_apart() {
        let mask = [[true, true, false, true], [false; 4], [true; 4]];
        let segments = [[5, 5, 5, 7], [0; 4], [7, -1, 7, 5]];
        let whole = Sequences::new([3, 4], |row, token| mask[row][token], |_, _| 0);
        assert_eq!((whole.count(), whole.of_token), (2, vec![0, 0, NONE, 0, NONE, NONE, NONE, NONE, 1, 1, 1, 1]));
        let packed = Sequences::new([3, 4], |row, token| mask[row][token], |row, token| segments[row][token]);
        assert_eq!((packed.count(), packed.of_token), (5, vec![0, 0, NONE, 1, NONE, NONE, NONE, NONE, 2, 3, 2, 4]));
    }
}
