//! Element types of tensors.

use std::str::FromStr;

use crate::CudaError;

/// Element type of stored states and weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// float32.
    F32,
    /// bfloat16.
    Bf16,
    /// float16.
    F16,
}

impl Dtype {
    pub(crate) const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F16];

    /// Name used in the names of kernels.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// Bytes of one element.
    pub(crate) const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

impl FromStr for Dtype {
    type Err = CudaError;

    /// Parses safetensors' spelling.
    fn from_str(name: &str) -> Result<Self, CudaError> {
        match name {
            "F32" => Ok(Self::F32),
            "BF16" => Ok(Self::Bf16),
            "F16" => Ok(Self::F16),
            _ => Err(CudaError::Operands(format!("dtype is {name:?}; use F32, BF16 or F16"))),
        }
    }
}
