//! Projection of LoRA factors onto the subspace of V = aligned − base, one module at a time.
//!
//! With C = V·Vᵀ/‖V‖ (Frobenius norm; Hsu et al. 2024, arXiv 2405.16833, section 3.2) and ΔW = B·A: T = VᵀB, S = V·T, and
//! every metric follows from r×r Gram matrices in f64. Neither C nor ΔW is formed.

mod apply;
mod error;
mod factors;
mod job;
mod operator;
mod outcome;
mod projector;
mod random;
mod round;
mod stacked;
mod subspace;
mod update;

pub use apply::{Applied, Normalization, apply};
pub use error::ProjectionError;
pub use factors::{NotFinite, Walk, append};
pub use job::{Factors, Job, JobError, Part};
pub use operator::{Operator, Settings};
pub use outcome::{FactorOutcome, JobOutcome, Rounded};
pub use projector::Projector;
pub use random::Random;
pub use round::{Overflow, write_rounded};
pub use stacked::Stacked;
pub use subspace::{Extent, Leading};
pub use update::{UpdateOutcome, project_update};
