//! Computes the distance and the factors of its gradient from the three sums.

use std::ops::AddAssign;

/// What is scaled to unit length before the distance is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Normalize {
    /// The tokens of a sequence, flattened.
    Sequence,
    /// Each token.
    Token,
    /// Nothing.
    None,
}

/// ‖d‖², ⟨d, h₀⟩ and ‖h₀‖² with d = h − h₀.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Sums {
    pub(super) squared: f64,
    pub(super) dot: f64,
    pub(super) norm: f64,
}

impl AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.squared += other.squared;
        self.dot += other.dot;
        self.norm += other.norm;
    }
}

/// The gradient of the distance with respect to one token is scale·(d − share·h). If scale is zero, the gradient is
/// zero whatever values the token holds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Factor {
    /// Factor of the whole gradient.
    pub scale: f64,
    /// Factor of h.
    pub share: f64,
}

impl Factor {
    /// The factors of the gradient times `weight`.
    pub(super) fn times(self, weight: f64) -> Self {
        Self { scale: weight * self.scale, share: self.share }
    }
}

impl Sums {
    /// The squared distance of the unit vectors, and the factors of its gradient.
    ///
    /// With p = ‖h‖ and q = ‖h₀‖: (‖d‖² − (p − q)²)/(pq), gradient 2/(pq)·(d − ((⟨d, h₀⟩ + ‖d‖²)/p²)·h). A zero vector
    /// has no direction: its unit vector is taken as zero, and so is its gradient. NaN stays NaN.
    pub(super) fn unit_distance(self) -> (f64, Factor) {
        let growth = 2.0 * self.dot + self.squared;
        let mut p_squared = self.norm + growth;
        if p_squared < 0.0 {
            p_squared = 0.0;
        }
        let (p, q) = (p_squared.sqrt(), self.norm.sqrt());
        if p == 0.0 || (q == 0.0 && !p.is_nan()) {
            let both = p == 0.0 && q == 0.0;
            return (if both { 0.0 } else { 1.0 }, Factor::default());
        }
        let gap = growth / (p + q);
        let scale = 2.0 / (p * q);
        (0.5 * scale * (self.squared - gap * gap), Factor { scale, share: (self.dot + self.squared) / p_squared })
    }

    /// ‖d‖², and the factors of its gradient.
    pub(super) const fn plain_distance(self) -> (f64, Factor) {
        (self.squared, Factor { scale: 2.0, share: 0.0 })
    }
}
