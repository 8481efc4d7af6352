//! The operators available to Python.

use pyo3::prelude::*;
use safelora_fast_core::projection as core;
use safelora_fast_core::projection::Extent;

use crate::errors::SettingsError;

/// What replaces B; projection/operators.py makes one from the settings.
#[pyclass(frozen, module = "safelora_fast._core")]
pub(crate) struct Operator {
    pub(crate) inner: core::Operator,
}

#[pymethods]
impl Operator {
    #[staticmethod]
    const fn frobenius() -> Self {
        Self { inner: core::Operator::Frobenius }
    }

    #[staticmethod]
    const fn spectral() -> Self {
        Self { inner: core::Operator::Spectral }
    }

    #[staticmethod]
    #[pyo3(signature = (*, rank=None, energy=None))]
    fn orthogonal(rank: Option<usize>, energy: Option<f64>) -> PyResult<Self> {
        Ok(Self { inner: core::Operator::Orthogonal(extent(rank, energy)?) })
    }

    #[staticmethod]
    #[pyo3(signature = (*, rank=None, energy=None, keep, sides="both"))]
    fn attenuate(rank: Option<usize>, energy: Option<f64>, keep: f64, sides: &str) -> PyResult<Self> {
        if !(0.0..=1.0).contains(&keep) {
            return Err(SettingsError::new_err(format!("keep is {keep}; give a share from 0 to 1")));
        }
        let both = match sides {
            "both" => true,
            "left" => false,
            _ => return Err(SettingsError::new_err(format!("sides is {sides:?}; use \"both\" or \"left\""))),
        };
        Ok(Self { inner: core::Operator::Attenuate { extent: extent(rank, energy)?, keep, both } })
    }

    #[staticmethod]
    #[pyo3(signature = (*, weight))]
    const fn restore(weight: f64) -> Self {
        Self { inner: core::Operator::Restore(weight) }
    }

    #[staticmethod]
    #[pyo3(signature = (*, rank=None, energy=None, weight))]
    fn extrapolate(rank: Option<usize>, energy: Option<f64>, weight: f64) -> PyResult<Self> {
        Ok(Self { inner: core::Operator::Extrapolate { extent: extent(rank, energy)?, weight } })
    }

    #[staticmethod]
    const fn zero() -> Self {
        Self { inner: core::Operator::Zero }
    }

    fn __repr__(&self) -> String {
        format!("Operator({:?})", self.inner)
    }
}

fn extent(rank: Option<usize>, energy: Option<f64>) -> PyResult<Extent> {
    match (rank, energy) {
        (Some(0), None) => Err(SettingsError::new_err("rank is 0; give at least 1")),
        (Some(rank), None) => Ok(Extent::Rank(rank)),
        (None, Some(energy)) if energy > 0.0 && energy <= 1.0 => Ok(Extent::Energy(energy)),
        (None, Some(energy)) => {
            Err(SettingsError::new_err(format!("energy is {energy}; give a share above 0 and up to 1")))
        }
        _ => Err(SettingsError::new_err("give either rank or energy")),
    }
}
