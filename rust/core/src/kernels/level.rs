//! The instruction set that the kernels use, chosen once at run time.

/// The environment variable that can lower the level.
pub const LEVEL_VARIABLE: &str = "SAFELORA_FAST_CPU_LEVEL";

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

/// Why a level cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LevelError {
    /// The word is not the name of a level.
    #[error("{LEVEL_VARIABLE} is {0:?}; use scalar, avx2 or avx512")]
    Unknown(String),
    /// The CPU lacks these instructions.
    #[error("this CPU cannot run {}; its widest level is {}", .0.name(), Level::detect().name())]
    Unavailable(Level),
}

impl Level {
    /// Every level, narrowest first.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// The widest level that this CPU supports.
    #[must_use]
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx512 {
                return Self::Avx512;
            }
            if avx2 {
                return Self::Avx2;
            }
        }
        Self::Scalar
    }

    /// The widest level that this CPU supports, or the level in `SAFELORA_FAST_CPU_LEVEL`.
    ///
    /// # Errors
    /// If the variable holds an unknown word or a level that this CPU lacks.
    pub fn from_environment() -> Result<Self, LevelError> {
        std::env::var_os(LEVEL_VARIABLE)
            .filter(|word| !word.is_empty())
            .map_or_else(|| Ok(Self::detect()), |word| Self::parse(&word.to_string_lossy()))
    }

    fn parse(word: &str) -> Result<Self, LevelError> {
        let level = Self::ALL.into_iter().find(|level| level.name() == word);
        level.ok_or_else(|| LevelError::Unknown(word.to_owned()))?.check()
    }

    /// Returns the level if this CPU supports it.
    ///
    /// # Errors
    /// If the CPU lacks the level.
    pub fn check(self) -> Result<Self, LevelError> {
        if self.is_available() { Ok(self) } else { Err(LevelError::Unavailable(self)) }
    }

    /// Whether this CPU supports the level.
    #[must_use]
    pub fn is_available(self) -> bool {
        self <= Self::detect()
    }

    /// Lower-case name, as in `SAFELORA_FAST_CPU_LEVEL`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_name_levels() {
        assert_eq!(Level::parse("scalar"), Ok(Level::Scalar));
        assert_eq!(Level::parse("AVX2"), Err(LevelError::Unknown("AVX2".to_owned())));
        for level in Level::ALL {
            let expected = if level.is_available() { Ok(level) } else { Err(LevelError::Unavailable(level)) };
            assert_eq!(Level::parse(level.name()), expected);
        }
    }
}
