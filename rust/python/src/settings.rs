//! Options as Python spells them.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use safelora_fast_core::kernels::{Dtype, Level};
use safelora_fast_core::projection::{Normalization, Operator};
use safelora_fast_core::stream;

use crate::errors::SettingsError;

/// The operator that the options of a stream name.
pub(crate) fn operator(
    operator: &str,
    normalize: &str,
    rank: Option<usize>,
    energy: Option<f64>,
) -> PyResult<Operator> {
    if operator != "orthogonal" && (rank.is_some() || energy.is_some()) {
        return Err(SettingsError::new_err("rank and energy belong to the orthogonal operator"));
    }
    match (operator, normalize, rank, energy) {
        ("safelora", ..) => Ok(match normalization(normalize)? {
            Normalization::Frobenius => Operator::Frobenius,
            Normalization::Spectral => Operator::Spectral,
        }),
        (_, "spectral", ..) => Err(SettingsError::new_err("normalize belongs to the safelora operator")),
        ("zero", ..) => Ok(Operator::Zero),
        ("orthogonal", _, Some(0), None) => Err(SettingsError::new_err("rank is 0; give at least 1")),
        ("orthogonal", _, Some(rank), None) => Ok(Operator::OrthogonalRank(rank)),
        ("orthogonal", _, None, Some(energy)) if energy > 0.0 && energy <= 1.0 => {
            Ok(Operator::OrthogonalEnergy(energy))
        }
        ("orthogonal", _, None, Some(energy)) => {
            Err(SettingsError::new_err(format!("energy is {energy}; give a share above 0 and up to 1")))
        }
        ("orthogonal", ..) => Err(SettingsError::new_err("the orthogonal operator takes either rank or energy")),
        _ => Err(SettingsError::new_err(format!(
            "unknown operator {operator:?}; use \"safelora\", \"orthogonal\" or \"zero\""
        ))),
    }
}

/// What the safelora operator divides by.
pub(crate) fn normalization(normalize: &str) -> PyResult<Normalization> {
    match normalize {
        "frobenius" => Ok(Normalization::Frobenius),
        "spectral" => Ok(Normalization::Spectral),
        _ => Err(SettingsError::new_err(format!(
            "unknown normalisation {normalize:?}; use \"frobenius\" or \"spectral\""
        ))),
    }
}

/// The element type that safetensors' name means; `owner` has it.
pub(crate) fn dtype(owner: &str, dtype: &str) -> PyResult<Dtype> {
    match dtype {
        "F32" => Ok(Dtype::F32),
        "BF16" => Ok(Dtype::Bf16),
        "F16" => Ok(Dtype::F16),
        _ => Err(PyValueError::new_err(format!("{owner} is {dtype}; use F32, BF16 or F16"))),
    }
}

/// The number of threads asked for, or the default.
pub(crate) fn threads(threads: Option<usize>) -> PyResult<usize> {
    match threads {
        Some(0) => Err(SettingsError::new_err("threads is 0; give at least 1")),
        Some(threads) => Ok(threads),
        None => stream::default_threads().map_err(|error| SettingsError::new_err(error.to_string())),
    }
}

/// The SIMD level to use here.
pub(crate) fn level() -> PyResult<Level> {
    Level::from_environment().map_err(|error| SettingsError::new_err(error.to_string()))
}
