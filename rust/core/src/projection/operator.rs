//! The operators: what replaces B, and what each needs from V.

use std::borrow::Cow;

use super::subspace::{Extent, Leading};
use crate::kernels::Engine;
use crate::linalg::{combine, gram, inner_products};

/// The operator O that replaces B by O·B.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operator {
    /// The paper's C = V·Vᵀ/‖V‖.
    Frobenius,
    /// C/σ₁(C) = V·Vᵀ/σ₁(V)², with a gain of at most 1.
    Spectral,
    /// U·Uᵀ with the leading left singular vectors U of V.
    Orthogonal(Extent),
    /// U·Uᵀ + keep·(1 − U·Uᵀ) on B and, if `both`, W·Wᵀ + keep·(1 − W·Wᵀ) on A with the right singular vectors W.
    Attenuate {
        /// Number of singular vectors.
        extent: Extent,
        /// The fraction of the rest to keep.
        keep: f64,
        /// Whether to attenuate A too.
        both: bool,
    },
    /// O = 0, the control.
    Zero,
    /// Δ + weight·V, for a full update Δ only.
    Restore(f64),
    /// Δ + weight·U·Uᵀ·V, for a full update Δ only.
    Extrapolate {
        /// Number of singular vectors.
        extent: Extent,
        /// The factor of the leading part of V.
        weight: f64,
    },
}

/// Settings of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// The operator.
    pub operator: Operator,
    /// Whether outcomes keep the projected B and A.
    pub keep_projected: bool,
    /// Whether outcomes keep the singular vectors that the operator uses.
    pub keep_subspace: bool,
    /// Seed of the random start of subspace iterations.
    pub seed: u64,
}

/// Data of one adapter and of V after both products with V.
pub(super) struct Products<'a> {
    /// B, (r, m).
    pub(super) lora_b: &'a [f32],
    /// Rows m of B.
    pub(super) rows: usize,
    /// S = V·T with T = VᵀB/t: (r, m).
    pub(super) applied: &'a [f32],
    /// SᵀS, (r, r).
    pub(super) applied_gram: &'a [f64],
    /// The power of two t.
    pub(super) scale: f64,
    /// ‖V‖, greater than zero.
    pub(super) v_norm: f64,
    /// Leading singular vectors of V, if [`Operator::extent`] needs any.
    pub(super) leading: Option<&'a Leading>,
}

/// O·B = factor·columns, and the Gram matrix of the columns.
pub(super) struct Projected<'a> {
    /// (r, m).
    pub(super) columns: Cow<'a, [f32]>,
    pub(super) factor: f64,
    pub(super) gram: Cow<'a, [f64]>,
}

impl Projected<'_> {
    /// Number r of vectors.
    pub(super) fn count(&self) -> usize {
        self.gram.len().isqrt()
    }
}

impl Operator {
    /// How many leading singular vectors of V the operator needs.
    pub(super) const fn extent(self) -> Option<Extent> {
        match self {
            Self::Frobenius | Self::Zero | Self::Restore(_) => None,
            Self::Spectral => Some(Extent::Rank(1)),
            Self::Orthogonal(extent) | Self::Attenuate { extent, .. } | Self::Extrapolate { extent, .. } => {
                Some(extent)
            }
        }
    }

    /// Whether the operator uses singular vectors of V, so that outcomes report their number.
    pub(super) const fn uses_vectors(self) -> bool {
        matches!(self, Self::Orthogonal(_) | Self::Attenuate { .. } | Self::Extrapolate { .. })
    }

    /// Whether the operator changes A, and so needs the right singular vectors too.
    pub(super) const fn changes_lora_a(self) -> bool {
        matches!(self, Self::Attenuate { both: true, .. })
    }

    /// The new A (r, n), from the right singular vectors (k, n) of V, if the operator changes A.
    pub(super) fn apply_to_lora_a(self, right: &[f32], lora_a: &[f32], n: usize) -> Option<Projected<'static>> {
        match self {
            Self::Attenuate { keep, both: true, .. } => Some(attenuated(right, lora_a, n, keep)),
            _ => None,
        }
    }

    /// Whether the operator is defined for B of a LoRA update.
    #[must_use]
    pub const fn is_for_lora(self) -> bool {
        !matches!(self, Self::Restore(_) | Self::Extrapolate { .. })
    }

    /// O·B.
    pub(super) fn apply<'a>(self, products: &Products<'a>, engine: &Engine) -> Projected<'a> {
        let factor = match (self, products.leading) {
            (Self::Orthogonal(_), Some(leading)) => {
                return engine.install(|| attenuated(&leading.vectors, products.lora_b, products.rows, 0.0));
            }
            (Self::Attenuate { keep, .. }, Some(leading)) => {
                return engine.install(|| attenuated(&leading.vectors, products.lora_b, products.rows, keep));
            }
            (Self::Zero, _) => 0.0,
            (Self::Spectral, Some(leading)) => products.scale / leading.largest().powi(2),
            _ => products.scale / products.v_norm,
        };
        let (columns, gram) = (Cow::Borrowed(products.applied), Cow::Borrowed(products.applied_gram));
        Projected { columns, factor, gram }
    }
}

/// U·Uᵀ·x + keep·(x − U·Uᵀ·x) for vectors x (r, m) and an orthonormal basis U (k, m).
fn attenuated(basis: &[f32], vectors: &[f32], m: usize, keep: f64) -> Projected<'static> {
    let coefficients = inner_products(basis, vectors, m);
    let mut columns = combine(basis, m, &coefficients, vectors.len() / m);
    if keep > 0.0 {
        for (inside, value) in columns.iter_mut().zip(vectors) {
            *inside = (keep * f64::from(*value) + (1.0 - keep) * f64::from(*inside)) as f32;
        }
    }
    let gram = gram(&columns, m);
    Projected { columns: Cow::Owned(columns), factor: 1.0, gram: Cow::Owned(gram) }
}
