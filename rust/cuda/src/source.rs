//! The kernels' sources, embedded.

use crate::{feature_distance, subspace_projection};

/// A source file of kernels.
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

    /// Name of the file.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FeatureDistance => "feature_distance.cu",
            Self::SubspaceProjection => "subspace_projection.cu",
        }
    }

    /// The whole program: the shared code, then the file.
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

    /// Compiler options, except the architecture.
    #[must_use]
    pub const fn options(self) -> &'static [&'static str] {
        &["--std=c++17", "-lineinfo"]
    }

    /// Names of the `extern "C"` kernels.
    #[must_use]
    pub fn kernels(self) -> Vec<String> {
        match self {
            Self::FeatureDistance => feature_distance::kernels(),
            Self::SubspaceProjection => subspace_projection::kernels(),
        }
    }
}
