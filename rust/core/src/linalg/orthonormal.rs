//! Orthonormal bases of the span of some vectors.

use super::{combine, gram, inner_products};

/// A vector is dropped if its component outside the previous ones is shorter than this, relative to its length.
const DEPENDENT: f64 = 1e-4;

/// An orthonormal basis of the span of `vectors`, orthogonal to the orthonormal vectors `against`.
///
/// The first j vectors of the basis have the same span as the first j independent vectors. Vectors that depend on
/// earlier ones or on `against` are left out, as are vectors that are zero or not finite.
#[must_use]
pub fn orthonormal(vectors: &[f32], against: &[f32], length: usize) -> Vec<f32> {
    // Twice is enough: the first round leaves errors of rounding/DEPENDENT, the second only rounding.
    let once = in_order(&independent(vectors, against, length), length);
    in_order(&removed(&once, against, length), length)
}

/// The component of each vector outside `against`, if it is more than rounding.
fn independent(vectors: &[f32], against: &[f32], length: usize) -> Vec<f32> {
    let norm = |vector: &[f32]| vector.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    let rest = removed(vectors, against, length);
    let pairs = rest.chunks_exact(length.max(1)).zip(vectors.chunks_exact(length.max(1)));
    let kept = pairs.filter(|(rest, vector)| norm(rest) > DEPENDENT * norm(vector));
    kept.flat_map(|(rest, _)| rest.iter().copied()).collect()
}

/// `vectors` without their components along the orthonormal vectors `against`.
#[must_use]
pub fn removed(vectors: &[f32], against: &[f32], length: usize) -> Vec<f32> {
    let mut rest = vectors.to_vec();
    if against.is_empty() || vectors.is_empty() {
        return rest;
    }
    let outputs = vectors.len() / length;
    let weights = inner_products(against, &rest, length);
    for (value, along) in rest.iter_mut().zip(combine(against, length, &weights, outputs)) {
        *value -= along;
    }
    rest
}

/// Gram-Schmidt on coefficients: every new vector is a linear combination of `vectors`, from their inner products.
fn in_order(vectors: &[f32], length: usize) -> Vec<f32> {
    if vectors.is_empty() {
        return Vec::new();
    }
    let count = vectors.len() / length;
    let products = gram(vectors, length);
    // Coefficients of each kept vector, and their products with the Gram matrix.
    let mut kept: Vec<(Vec<f64>, Vec<f64>)> = Vec::new();
    for index in 0..count {
        let own = products[index * count + index].sqrt();
        let mut coefficients = vec![0.0; count];
        coefficients[index] = 1.0 / own;
        for _ in 0..2 {
            for (other, image) in &kept {
                let along = dot(image, &coefficients);
                for (coefficient, other) in coefficients.iter_mut().zip(other) {
                    *coefficient -= along * other;
                }
            }
        }
        let mut image: Vec<f64> = products.chunks_exact(count).map(|row| dot(row, &coefficients)).collect();
        let norm = dot(&image, &coefficients).max(0.0).sqrt();
        if own > 0.0 && norm > DEPENDENT {
            coefficients.iter_mut().chain(&mut image).for_each(|value| *value /= norm);
            kept.push((coefficients, image));
        }
    }
    let outputs = kept.len();
    let mut weights = vec![0.0; count * outputs];
    for (j, (coefficients, _)) in kept.iter().enumerate() {
        for (k, coefficient) in coefficients.iter().enumerate() {
            weights[k * outputs + j] = *coefficient;
        }
    }
    combine(vectors, length, &weights, outputs)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_orthonormal(basis: &[f32], length: usize) {
        let count = basis.len() / length;
        for (index, product) in gram(basis, length).into_iter().enumerate() {
            let expected = if index % (count + 1) == 0 { 1.0 } else { 0.0 };
            assert!((product - expected).abs() < 1e-6, "{product} at {index}");
        }
    }

    #[test]
    fn dependent_zero_and_nan_vectors_are_left_out() {
        let vectors = [
            [1.0, 1.0, 0.0, 0.0],
            [2.0, 2.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0],
            [1.0, 0.0, 1e-3, 0.0],
            [f32::NAN, 0.0, 0.0, 1.0],
            [0.0, 0.0, 1.0, 0.0],
        ];
        let finite: Vec<f32> = vectors.iter().filter(|vector| !vector[0].is_nan()).flatten().copied().collect();
        let basis = orthonormal(&finite, &[], 4);
        assert_eq!(basis.len(), 3 * 4);
        assert_orthonormal(&basis, 4);
        assert!(orthonormal(&vectors.concat(), &[], 4).iter().all(|value| value.is_finite()));
    }

    #[test]
    fn the_basis_is_orthogonal_to_what_it_is_taken_against() {
        let against = [0.6, 0.8, 0.0, 0.0, 0.0];
        let vectors = [0.6, 0.8, 1e-3, 0.0, 0.0, 3.0, 4.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        let basis = orthonormal(&vectors, &against, 5);
        assert_eq!(basis.len(), 2 * 5);
        assert_orthonormal(&[&against[..], &basis].concat(), 5);
    }
}
