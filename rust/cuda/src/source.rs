//! The kernels' sources, embedded.

/// A file of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// Feature distance and its gradient.
    FeatureDistance,
    /// Products of many matrices with thin factors.
    SubspaceProjection,
}

impl Source {
    /// Every source.
    pub const ALL: [Self; 2] = [Self::FeatureDistance, Self::SubspaceProjection];

    /// The file's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FeatureDistance => "feature_distance.cu",
            Self::SubspaceProjection => "subspace_projection.cu",
        }
    }

    /// The program: what the files share, and the file.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::FeatureDistance => {
                concat!(include_str!("../kernels/element.cuh"), include_str!("../kernels/feature_distance.cu"))
            }
            Self::SubspaceProjection => {
                concat!(include_str!("../kernels/element.cuh"), include_str!("../kernels/subspace_projection.cu"))
            }
        }
    }

    /// Options of the compiler, the architecture aside.
    #[must_use]
    pub const fn options(self) -> &'static [&'static str] {
        &["--std=c++17", "-lineinfo"]
    }

    /// Names of the kernels, which are `extern "C"`.
    #[must_use]
    pub const fn kernels(self) -> &'static [&'static str] {
        match self {
            Self::FeatureDistance => &[
                "token_sums_f32",
                "token_sums_bf16",
                "token_sums_f16",
                "sequence_factors",
                "total_distance",
                "gradient_f32",
                "gradient_bf16",
                "gradient_f16",
            ],
            Self::SubspaceProjection => &[
                "transposed_single_f32_16",
                "transposed_single_f32_32",
                "transposed_single_bf16_16",
                "transposed_single_bf16_32",
                "transposed_single_f16_16",
                "transposed_single_f16_32",
                "transposed_pair_f32_16",
                "transposed_pair_f32_32",
                "transposed_pair_bf16_16",
                "transposed_pair_bf16_32",
                "transposed_pair_f16_16",
                "transposed_pair_f16_32",
                "straight_single_f32_16",
                "straight_single_f32_32",
                "straight_single_bf16_16",
                "straight_single_bf16_32",
                "straight_single_f16_16",
                "straight_single_f16_32",
                "straight_pair_f32_16",
                "straight_pair_f32_32",
                "straight_pair_bf16_16",
                "straight_pair_bf16_32",
                "straight_pair_f16_16",
                "straight_pair_f16_32",
                "add_chunks",
                "add_squares",
            ],
        }
    }
}
