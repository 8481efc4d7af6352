//! Advice to the system about the pages of a mapped file.

use memmap2::{Advice, Mmap, UncheckedAdvice};

/// No system in use has larger pages. A stretch that is cut to multiples of it does not touch its neighbors' pages.
const LARGEST_PAGE: usize = 65536;

/// The pages that hold a stretch of a mapped file. Advice is a hint: where the system refuses it, nothing happens.
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

    /// Bytes of the stretch.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.end - self.begin
    }

    /// Whether the stretch holds nothing.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.begin == self.end
    }

    /// The stretch in pieces of at most `length` bytes.
    pub fn pieces(self, length: usize) -> impl Iterator<Item = Self> {
        let Self { map, begin, end } = self;
        (begin..end).step_by(length.max(1)).map(move |start| Self { map, begin: start, end: end.min(start + length) })
    }

    /// Starts reading the stretch from disk without waiting.
    pub fn will_need(&self) {
        let _ = self.map.advise_range(Advice::WillNeed, self.begin, self.len());
    }

    /// Reads the stretch from disk where needed and maps it, so that later reads do not wait.
    pub fn populate(&self) {
        #[cfg(target_os = "linux")]
        let _ = self.map.advise_range(Advice::PopulateRead, self.begin, self.len());
    }

    /// Gives back the pages that lie completely in the stretch; the system reads them again when they are used again.
    pub fn give_back(&self) {
        let begin = self.begin.next_multiple_of(LARGEST_PAGE);
        let end = if self.end == self.map.len() { self.end } else { self.end / LARGEST_PAGE * LARGEST_PAGE };
        if begin < end {
            // SAFETY: the map is a read-only map of a file: dropped pages come back from the file with the same bytes.
            let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, begin, end - begin) };
        }
    }
}
