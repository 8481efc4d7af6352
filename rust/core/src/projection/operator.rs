//! The operators: what replaces B, and what each needs to know of V.

use std::borrow::Cow;

use super::subspace::{Extent, Leading};
use crate::kernels::Engine;
use crate::linalg::{combine, gram, inner_products};

/// The operator O that replaces B by O·B.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operator {
    /// C = V·Vᵀ/‖V‖, the paper's.
    Frobenius,
    /// C/σ₁(C) = V·Vᵀ/σ₁(V)², whose largest gain is 1.
    Spectral,
    /// U·Uᵀ with the leading left singular vectors U of V.
    Orthogonal(Extent),
    /// U·Uᵀ + keep·(1 − U·Uᵀ) on B and, with `both` sides, W·Wᵀ + keep·(1 − W·Wᵀ) on A with the right singular vectors W.
    Attenuate {
        /// How many singular vectors.
        extent: Extent,
        /// The share of the rest that stays.
        keep: f64,
        /// Whether A is attenuated too.
        both: bool,
    },
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
    /// Whether outcomes keep the singular vectors that the operator uses.
    pub keep_subspace: bool,
    /// Seed of the random start of subspace iterations.
    pub seed: u64,
}

/// What is known of one adapter and of V once both products with V are done.
pub(super) struct Products<'a> {
    /// B, (r, m).
    pub(super) lora_b: &'a [f32],
    /// Rows m of B.
    pub(super) rows: usize,
    /// S = V·T with T = VᵀB/t, (r, m).
    pub(super) applied: &'a [f32],
    /// SᵀS, (r, r).
    pub(super) applied_gram: &'a [f64],
    /// The power of two t.
    pub(super) scale: f64,
    /// ‖V‖, above zero.
    pub(super) v_norm: f64,
    /// Leading singular vectors of V, where [`Operator::extent`] asks for some.
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
            Self::Frobenius | Self::Zero => None,
            Self::Spectral => Some(Extent::Rank(1)),
            Self::Orthogonal(extent) | Self::Attenuate { extent, .. } => Some(extent),
        }
    }

    /// Whether the operator uses singular vectors of V, so that outcomes say how many.
    pub(super) const fn uses_vectors(self) -> bool {
        matches!(self, Self::Orthogonal(_) | Self::Attenuate { .. })
    }

    /// Whether the operator changes A, so that it needs the right singular vectors too.
    pub(super) const fn changes_lora_a(self) -> bool {
        matches!(self, Self::Attenuate { both: true, .. })
    }

    /// What A (r, n) becomes with the right singular vectors (k, n) of V, if the operator changes it.
    pub(super) fn apply_to_lora_a(self, right: &[f32], lora_a: &[f32], n: usize) -> Option<Projected<'static>> {
        match self {
            Self::Attenuate { keep, both: true, .. } => Some(attenuated(right, lora_a, n, keep)),
            _ => None,
        }
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
