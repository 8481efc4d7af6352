//! Advice to the system about the pages of a mapped file.

use memmap2::{Advice, Mmap, UncheckedAdvice};

/// No system in use has larger pages. A range cut to multiples of this size does not touch its neighbors' pages.
const LARGEST_PAGE: usize = 65536;

/// The pages of a range of a mapped file. Advice is only a hint; if the system rejects it, nothing happens.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a> {
    map: &'a Mmap,
    begin: usize,
    end: usize,
}

impl<'a> Pages<'a> {
    pub(super) const fn new(map: &'a Mmap, begin: usize, end: usize) -> Self {
        Self { map, begin, end }
    }

    /// Length of the range in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.end - self.begin
    }

    /// Whether the range is empty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.begin == self.end
    }

    /// The range in pieces of at most `length` bytes.
    pub fn pieces(self, length: usize) -> impl Iterator<Item = Self> {
        let Self { map, begin, end } = self;
        (begin..end).step_by(length.max(1)).map(move |start| Self { map, begin: start, end: end.min(start + length) })
    }

    /// Starts reading the range from disk without waiting.
    pub fn will_need(&self) {
        let _ = self.map.advise_range(Advice::WillNeed, self.begin, self.len());
    }

    /// Reads the range from disk if needed and maps it, so that later reads do not wait.
    pub fn populate(&self) {
        #[cfg(target_os = "linux")]
        let _ = self.map.advise_range(Advice::PopulateRead, self.begin, self.len());
    }

    /// Releases the pages that are completely inside the range. The system reads them again at the next use.
    pub fn give_back(&self) {
        let begin = self.begin.next_multiple_of(LARGEST_PAGE);
        let end = if self.end == self.map.len() { self.end } else { self.end / LARGEST_PAGE * LARGEST_PAGE };
        if begin < end {
            // SAFETY: this is a read-only map of a file: released pages come back from the file with the same bytes.
            let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, begin, end - begin) };
        }
    }
}
