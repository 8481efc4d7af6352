//! What to project with.

/// The operator O that replaces B by O·B.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operator {
    /// C = V·Vᵀ/‖V‖, the paper's.
    Frobenius,
    /// C/σ₁(C) = V·Vᵀ/σ₁(V)², whose largest gain is 1.
    Spectral,
    /// U·Uᵀ with the given number of leading left singular vectors of V.
    OrthogonalRank(usize),
    /// U·Uᵀ with as many leading left singular vectors of V as hold this share of ‖V‖².
    OrthogonalEnergy(f64),
    /// O = 0, the control.
    Zero,
}

/// Settings of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// The operator.
    pub operator: Operator,
    /// Whether outcomes keep the projected factors.
    pub keep_projected: bool,
    /// Seed of the random start of subspace iterations.
    pub seed: u64,
}
