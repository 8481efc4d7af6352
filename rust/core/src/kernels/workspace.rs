//! Memory that the engine keeps between calls: fresh pages cost more than the products themselves.

use super::simd::{LANES, Line};

/// Cache-line aligned buffers that only ever grow.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    vectors: Vec<Line>,
    sums: Vec<Line>,
    squares: Vec<f64>,
}

/// What one product borrows of the workspace; contents are left over from the last one.
pub(super) struct Borrowed<'a> {
    /// The vectors that V is multiplied with, rearranged.
    pub(super) vectors: &'a mut [f32],
    /// The result, rearranged.
    pub(super) sums: &'a mut [Line],
    /// Sums of squares of V, in parts.
    pub(super) squares: &'a mut [f64],
}

impl Workspace {
    /// Room for `vectors` f32 values, `sums` lines and `squares` f64 values.
    pub(super) fn borrow(&mut self, vectors: usize, sums: usize, squares: usize) -> Borrowed<'_> {
        let lines = vectors.div_ceil(LANES);
        grow(&mut self.vectors, lines, Line::ZERO);
        grow(&mut self.sums, sums, Line::ZERO);
        grow(&mut self.squares, squares, 0.0);
        // SAFETY: a Line is sixteen f32 without padding, and `lines` of them hold `vectors` values.
        let values = unsafe { std::slice::from_raw_parts_mut(self.vectors.as_mut_ptr().cast(), vectors) };
        Borrowed { vectors: values, sums: &mut self.sums[..sums], squares: &mut self.squares[..squares] }
    }
}

fn grow<T: Clone>(buffer: &mut Vec<T>, length: usize, fill: T) {
    if buffer.len() < length {
        // The old contents are of no use: let them go before asking for more.
        *buffer = Vec::new();
        *buffer = vec![fill; length];
    }
}

/// A pointer that several threads write through, each to elements of its own.
#[derive(Clone, Copy)]
pub(super) struct Shared(*mut f32);

// SAFETY: the pointer itself is plain data; whoever writes through it answers for disjointness.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(super) fn new(values: &mut [f32]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// The address of element `index`.
    pub(super) fn at(self, index: usize) -> *mut f32 {
        self.0.wrapping_add(index)
    }
}
