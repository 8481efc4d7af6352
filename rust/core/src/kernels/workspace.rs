//! Memory that the engine keeps between calls: fresh pages would cost more than the products.

use super::simd::{LANES, Line};

/// Buffers aligned to cache lines that never shrink.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    vectors: Vec<Line>,
    sums: Vec<Line>,
    squares: Vec<f64>,
}

/// Buffers for one product. They still hold the last product's contents.
pub(super) struct Borrowed<'a> {
    /// The rearranged vectors to multiply V with.
    pub(super) vectors: &'a mut [f32],
    /// The rearranged result.
    pub(super) sums: &'a mut [Line],
    /// Partial sums of squares of V.
    pub(super) squares: &'a mut [f64],
}

impl Workspace {
    /// Borrows `vectors` f32 values, `sums` lines and `squares` f64 values.
    pub(super) fn borrow(&mut self, vectors: usize, sums: usize, squares: usize) -> Borrowed<'_> {
        let lines = vectors.div_ceil(LANES);
        grow(&mut self.vectors, lines, Line::ZERO);
        grow(&mut self.sums, sums, Line::ZERO);
        grow(&mut self.squares, squares, 0.0);
        // SAFETY: a Line is sixteen f32 without padding, and the buffer's lines hold at least `vectors` values.
        let values = unsafe { std::slice::from_raw_parts_mut(self.vectors.as_mut_ptr().cast(), vectors) };
        Borrowed { vectors: values, sums: &mut self.sums[..sums], squares: &mut self.squares[..squares] }
    }
}

fn grow<T: Clone>(buffer: &mut Vec<T>, length: usize, fill: T) {
    if buffer.len() < length {
        // The old contents are not needed: free them before allocating more.
        *buffer = Vec::new();
        *buffer = vec![fill; length];
    }
}

/// A pointer that several threads write through, each to its own elements.
#[derive(Clone, Copy)]
pub(super) struct Shared(*mut f32);

// SAFETY: the pointer itself is plain data; code that writes through it ensures that writes are disjoint.
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
