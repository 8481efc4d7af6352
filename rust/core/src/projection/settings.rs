//! What to project with.

use super::subspace::Extent;

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

impl Operator {
    /// How much of the subspace of V (m, n) the operator needs to know.
    pub(super) fn extent(self, (m, n): (usize, usize)) -> Option<Extent> {
        match self {
            Self::Frobenius | Self::Zero => None,
            Self::Spectral => Some(Extent::Rank(1)),
            Self::OrthogonalRank(rank) => Some(Extent::Rank(rank.min(m).min(n))),
            Self::OrthogonalEnergy(share) => Some(Extent::Energy(share)),
        }
    }

    pub(super) const fn is_orthogonal(self) -> bool {
        matches!(self, Self::OrthogonalRank(_) | Self::OrthogonalEnergy(_))
    }
}

/// Settings of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// The operator.
    pub operator: Operator,
    /// Whether outcomes keep the projected factors.
    pub keep_projected: bool,
    /// Whether outcomes keep what the orthogonal operator projects onto.
    pub keep_subspace: bool,
    /// Seed of the random start of subspace iterations.
    pub seed: u64,
}
