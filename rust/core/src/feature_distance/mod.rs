//! The squared distance between the unit vectors of hidden states h and reference states h₀, and its gradient.
//!
//! With d = h − h₀, the forward reduces ‖d‖², ⟨d, h₀⟩ and ‖h₀‖² in one read. The backward reads once more and writes
//! once. d is computed in f32. Products of two f32 are exact in f64, where they are summed. Fused and separate
//! arithmetic therefore agree. The only error is the rounding of d, and for close states d is exact.
//!
//! Deterministic like the products with V: every token is summed in the same order on every level, tokens are summed in
//! their order in the batch, and the gradient of an element depends only on that element.

// As in the kernels: parts of a micro kernel must be inlined whatever their size, a level imports all its intrinsics,
// and indices keep lanes in step.
#![allow(clippy::inline_always, clippy::wildcard_imports, clippy::needless_range_loop)]

mod backward;
mod element;
mod formula;
mod forward;
mod rows;
mod sequences;
mod states;

pub use backward::{Gradient, backward};
pub use formula::{Factor, Normalize};
pub use forward::forward;
pub use sequences::Sequences;
pub use states::{Pair, States};
