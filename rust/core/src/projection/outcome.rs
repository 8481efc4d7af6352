//! Results of projecting one module.

use super::{Leading, Overflow};

/// Result of projecting one adapter's LoRA factors in one module. The stub of the Python class of this name defines the
/// metrics.
#[derive(Clone, Debug)]
pub struct FactorOutcome {
    /// Frobenius cosine of C·ΔW and ΔW, for every operator.
    pub cosine: f64,
    /// ‖O·B‖/‖B‖.
    pub gain: f64,
    /// ‖B‖.
    pub lora_b_norm: f64,
    /// ‖O·B‖.
    pub lora_b_norm_projected: f64,
    /// ‖B·A‖.
    pub update_norm: f64,
    /// ‖O·B·A‖.
    pub update_norm_projected: f64,
    /// O·B, (m, r).
    pub lora_b: Option<Rounded>,
    /// The new A, (r, n), if the operator changes it.
    pub lora_a: Option<Rounded>,
}

/// A projected LoRA factor, row-major in its stored dtype.
#[derive(Clone, Debug)]
pub struct Rounded {
    /// Its elements.
    pub bytes: Vec<u8>,
    /// The first element that is out of the dtype's range.
    pub overflow: Option<Overflow>,
}

/// Result of projecting one module.
#[derive(Clone, Debug)]
pub struct JobOutcome {
    /// ‖V‖.
    pub v_norm: f64,
    /// Number of singular vectors that the operator uses, if any.
    pub rank: Option<usize>,
    /// Fraction of ‖V‖² in these vectors.
    pub energy: Option<f64>,
    /// σ₁(V).
    pub spectral_norm: Option<f64>,
    /// These vectors, if they are kept.
    pub leading: Option<Leading>,
    /// One outcome per adapter.
    pub factors: Vec<FactorOutcome>,
}

/// Gram matrices of one adapter, (r, r): BᵀB and A·Aᵀ.
#[derive(Debug)]
pub(super) struct Grams {
    pub(super) lora_b: Vec<f64>,
    pub(super) lora_a: Vec<f64>,
}

impl Grams {
    /// ‖B‖.
    pub(super) fn lora_b_norm(&self, rank: usize) -> f64 {
        diagonal(&self.lora_b, rank).sqrt()
    }

    /// ‖B·A‖.
    pub(super) fn update_norm(&self) -> f64 {
        self.of_update(&self.lora_b)
    }

    /// ‖X·A‖ for XᵀX.
    pub(super) fn of_update(&self, gram: &[f64]) -> f64 {
        product_norm(gram, &self.lora_a)
    }

    /// Cosine of C·ΔW and ΔW from TᵀT and SᵀS, where T = VᵀB/t and S = V·T.
    pub(super) fn cosine(&self, reduced: &[f64], applied: &[f64], scale: f64) -> f64 {
        let inner = scale * trace(reduced, &self.lora_a).max(0.0);
        let norms = self.of_update(applied) * self.update_norm();
        // C·ΔW = 0 makes both sides zero; 0/0 is NaN, as documented.
        (inner / norms).clamp(-1.0, 1.0)
    }
}

/// ‖X·Y‖ from XᵀX and Y·Yᵀ.
pub(super) fn product_norm(left: &[f64], right: &[f64]) -> f64 {
    trace(left, right).max(0.0).sqrt()
}

/// Trace of an (n, n) matrix.
pub(super) fn diagonal(matrix: &[f64], n: usize) -> f64 {
    matrix.iter().step_by(n + 1).sum()
}

/// Trace of the product of two symmetric matrices.
fn trace(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
