//! The squared distance between the unit vectors of hidden states h and their reference h₀, and its gradient.
//!
//! With d = h − h₀ the forward reduces ‖d‖², ⟨d, h₀⟩ and ‖h₀‖² in one read, the backward reads once more and writes once.
//! d is formed in f32; products of two f32 are exact in f64, where they are summed. So fused and separate arithmetic agree,
//! and what is lost is the rounding of d alone, which close states do not even have.
//!
//! Deterministic as the products with V are: every token is summed in one order on every level, tokens are summed in the
//! order in which they stand, and the gradient of an element depends on that element alone.

// As in the kernels: pieces of a micro kernel must be inlined whatever their size, a level takes its instruction set at
// once, and indices keep lanes in step.
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
