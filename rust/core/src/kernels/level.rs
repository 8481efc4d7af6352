//! Which instruction set the kernels use, chosen once at run time.

/// A SIMD level, ordered from the most portable to the widest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Plain Rust.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Level {
    /// The widest level that this CPU has.
    #[must_use]
    pub fn detect() -> Self {
        Self::Scalar
    }

    /// Whether this CPU can run the level.
    #[must_use]
    pub fn is_available(self) -> bool {
        self <= Self::detect()
    }

    /// Lower-case name, as `SAFELORA_FAST_CPU_LEVEL` spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }
}
