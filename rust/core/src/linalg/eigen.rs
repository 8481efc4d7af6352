//! Eigenvalues of small symmetric matrices.

use nalgebra::DMatrix;

/// Eigenvalues of a symmetric matrix in descending order, and its eigenvectors.
#[derive(Debug)]
pub struct Eigen {
    /// Eigenvalues, the largest first.
    pub values: Vec<f64>,
    /// Eigenvectors as columns of an (n, n) matrix, row-major.
    pub vectors: Vec<f64>,
}

/// Decomposes a symmetric (n, n) matrix. The result is empty if the matrix is not finite.
///
/// # Panics
/// If the matrix is not n×n.
#[must_use]
pub fn symmetric_eigen(matrix: &[f64], n: usize) -> Eigen {
    assert_eq!(matrix.len(), n * n, "an {n}x{n} matrix");
    if n == 0 || !matrix.iter().all(|value| value.is_finite()) {
        return Eigen { values: Vec::new(), vectors: Vec::new() };
    }
    let decomposed = DMatrix::from_row_slice(n, n, matrix).symmetric_eigen();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| decomposed.eigenvalues[*b].total_cmp(&decomposed.eigenvalues[*a]));
    let values = order.iter().map(|index| decomposed.eigenvalues[*index]).collect();
    let row = |row: usize| order.iter().map(move |index| (row, *index));
    let vectors = (0..n).flat_map(row).map(|(row, col)| decomposed.eigenvectors[(row, col)]).collect();
    Eigen { values, vectors }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn vectors_diagonalize_the_matrix(n in 1_usize..20, values in prop::collection::vec(-1.0_f64..1.0, 400)) {
            let at = |i: usize, j: usize| values[i.max(j) * 20 + i.min(j)] * 0.1_f64.powf((i.max(j) / 4) as f64);
            let matrix: Vec<f64> = (0..n * n).map(|index| at(index / n, index % n)).collect();
            let eigen = symmetric_eigen(&matrix, n);
            prop_assert!(eigen.values.windows(2).all(|pair| pair[0] >= pair[1]));
            for (k, value) in eigen.values.iter().enumerate() {
                for i in 0..n {
                    let image: f64 = (0..n).map(|j| matrix[i * n + j] * eigen.vectors[j * n + k]).sum();
                    prop_assert!((image - value * eigen.vectors[i * n + k]).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn a_matrix_that_is_not_finite_has_none() {
        assert!(symmetric_eigen(&[f64::NAN], 1).values.is_empty());
        assert!(symmetric_eigen(&[], 0).values.is_empty());
    }
}
