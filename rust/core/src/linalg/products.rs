//! Inner products and linear combinations of long vectors.

use rayon::prelude::*;

use super::multiversion;

/// Vectors that are loaded together.
const TILE: usize = 4;
/// Partial sums of one inner product.
const LANES: usize = 8;
/// Linear combinations that are summed together, and columns of them: the sums stay in registers.
const OUTPUTS: usize = 6;
const BLOCK: usize = 8;
/// Columns of all combinations that one thread computes at a time.
const PANEL: usize = 64;

/// Inner products ⟨aᵢ, aⱼ⟩ of vectors of `length` values: a symmetric (count, count) matrix, row-major.
///
/// # Panics
/// If `a` does not hold whole vectors.
#[must_use]
pub fn gram(a: &[f32], length: usize) -> Vec<f64> {
    products(a, a, length, true)
}

/// Inner products ⟨aᵢ, bⱼ⟩ of vectors of `length` values: an (a's count, b's count) matrix, row-major.
///
/// # Panics
/// If `a` or `b` does not hold whole vectors.
#[must_use]
pub fn inner_products(a: &[f32], b: &[f32], length: usize) -> Vec<f64> {
    products(a, b, length, false)
}

fn products(a: &[f32], b: &[f32], length: usize, symmetric: bool) -> Vec<f64> {
    let (rows, cols) = (count(a, length), count(b, length));
    let tiles: Vec<(usize, usize)> = (0..rows)
        .step_by(TILE)
        .flat_map(|row| (0..cols).step_by(TILE).map(move |col| (row, col)))
        .filter(|(row, col)| !symmetric || col <= row)
        .collect();
    let sums: Vec<[[f64; TILE]; TILE]> = tiles
        .par_iter()
        .map(|(row, col)| {
            let at = |vectors: &[f32], count: usize, first: usize, index: usize| {
                // A tile across the edge repeats the last vector; the copies are not stored.
                let start = (first + index).min(count - 1) * length;
                start..start + length.min(vectors.len())
            };
            let left: [&[f32]; TILE] = std::array::from_fn(|index| &a[at(a, rows, *row, index)]);
            let right: [&[f32]; TILE] = std::array::from_fn(|index| &b[at(b, cols, *col, index)]);
            tile(left, right)
        })
        .collect();
    let mut result = vec![0.0; rows * cols];
    for ((row, col), sums) in tiles.into_iter().zip(sums) {
        for (i, sums) in sums.iter().enumerate().take(rows - row) {
            for (j, sum) in sums.iter().enumerate().take(cols - col) {
                result[(row + i) * cols + col + j] = *sum;
                if symmetric {
                    result[(col + j) * cols + row + i] = *sum;
                }
            }
        }
    }
    result
}

multiversion!(tile, tile_body, (left: [&[f32]; TILE], right: [&[f32]; TILE]) -> [[f64; TILE]; TILE]);

#[allow(clippy::inline_always, reason = "the body takes the features of the function it is inlined in")]
#[inline(always)]
fn tile_body(left: [&[f32]; TILE], right: [&[f32]; TILE]) -> [[f64; TILE]; TILE] {
    let mut sums = [[[0.0; LANES]; TILE]; TILE];
    // The same length for all, so the compiler can drop the bounds checks.
    let length = left[0].len();
    let (left, right) = (left.map(|vector| &vector[..length]), right.map(|vector| &vector[..length]));
    let whole = length - length % LANES;
    let mut start = 0;
    while start < whole {
        add(&mut sums, left, right, start);
        start += LANES;
    }
    if whole < length {
        let (left, right) = (left.map(|vector| padded(&vector[whole..])), right.map(|vector| padded(&vector[whole..])));
        add(
            &mut sums,
            left.each_ref().map(<[f32; LANES]>::as_slice),
            right.each_ref().map(<[f32; LANES]>::as_slice),
            0,
        );
    }
    sums.map(|sums| sums.map(total))
}

fn padded(rest: &[f32]) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    lanes[..rest.len()].copy_from_slice(rest);
    lanes
}

// Loops instead of array methods, which are not inlined and would keep the sums out of registers.
#[allow(clippy::inline_always, clippy::needless_range_loop, reason = "as above")]
#[inline(always)]
fn add(sums: &mut [[[f64; LANES]; TILE]; TILE], left: [&[f32]; TILE], right: [&[f32]; TILE], start: usize) {
    let mut b = [[0.0; LANES]; TILE];
    for j in 0..TILE {
        let values = &right[j][start..start + LANES];
        for lane in 0..LANES {
            b[j][lane] = f64::from(values[lane]);
        }
    }
    for i in 0..TILE {
        let values = &left[i][start..start + LANES];
        let mut a = [0.0; LANES];
        for lane in 0..LANES {
            a[lane] = f64::from(values[lane]);
        }
        for j in 0..TILE {
            for lane in 0..LANES {
                sums[i][j][lane] += a[lane] * b[j][lane];
            }
        }
    }
}

fn total(lanes: [f64; LANES]) -> f64 {
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + b) + (c + d)) + ((e + f) + (g + h))
}

/// `yⱼ = Σₖ weights[k, j]·xₖ` with sums in f64: `outputs` vectors of `length` values, rounded once to f32.
///
/// # Panics
/// If `x` does not hold whole vectors or `weights` is not (x's count, outputs), row-major.
#[must_use]
pub fn combine(x: &[f32], length: usize, weights: &[f64], outputs: usize) -> Vec<f32> {
    let inputs = count(x, length);
    assert_eq!(weights.len(), inputs * outputs, "{inputs} vectors, {outputs} outputs");
    let tiles: Vec<Vec<[f64; OUTPUTS]>> = (0..outputs)
        .step_by(OUTPUTS)
        .map(|first| {
            let count = OUTPUTS.min(outputs - first);
            let rows = weights.chunks_exact(outputs);
            rows.map(|row| std::array::from_fn(|j| if j < count { row[first + j] } else { 0.0 })).collect()
        })
        .collect();
    let starts: Vec<usize> = (0..length).step_by(PANEL).collect();
    let panels: Vec<Vec<[f32; BLOCK]>> = starts
        .par_iter()
        .map(|start| {
            (*start..length.min(start + PANEL)).step_by(BLOCK).flat_map(|at| block(x, length, at, &tiles)).collect()
        })
        .collect();
    let mut y = vec![0.0_f32; outputs * length];
    y.par_chunks_mut(length.max(1)).enumerate().for_each(|(j, y)| {
        let blocks = panels.iter().flat_map(|panel| panel.iter().skip(j).step_by(tiles.len() * OUTPUTS));
        for (values, sums) in y.chunks_mut(BLOCK).zip(blocks) {
            values.copy_from_slice(&sums[..values.len()]);
        }
    });
    y
}

multiversion!(block, block_body, (x: &[f32], length: usize, start: usize, tiles: &[Vec<[f64; OUTPUTS]>]) -> Vec<[f32; BLOCK]>);

/// Adjacent columns of all linear combinations, padded with zeros: (output, column).
#[allow(clippy::inline_always, clippy::needless_range_loop, reason = "as above")]
#[inline(always)]
fn block_body(x: &[f32], length: usize, start: usize, tiles: &[Vec<[f64; OUTPUTS]>]) -> Vec<[f32; BLOCK]> {
    let width = BLOCK.min(length - start);
    let mut values = vec![[0.0; BLOCK]; x.len() / length];
    for (values, vector) in values.iter_mut().zip(x.chunks_exact(length)) {
        for (value, element) in values.iter_mut().zip(&vector[start..start + width]) {
            *value = f64::from(*element);
        }
    }
    let mut results = Vec::with_capacity(tiles.len() * OUTPUTS);
    for weights in tiles {
        let mut sums = [[0.0; BLOCK]; OUTPUTS];
        for (values, weights) in values.iter().zip(weights) {
            for j in 0..OUTPUTS {
                for lane in 0..BLOCK {
                    sums[j][lane] += weights[j] * values[lane];
                }
            }
        }
        results.extend(sums.map(|sums| sums.map(|sum| sum as f32)));
    }
    results
}

fn count(vectors: &[f32], length: usize) -> usize {
    if length == 0 {
        return 0;
    }
    assert!(vectors.len().is_multiple_of(length), "{} values are no vectors of {length}", vectors.len());
    vectors.len() / length
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vectors(count: usize, length: usize, seed: u32) -> Vec<f32> {
        (0..count * length)
            .map(|index| {
                ((index as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 8_388_608.0 - 1.0
            })
            .collect()
    }

    proptest! {
        #[test]
        fn products_are_sums_of_products(rows in 1_usize..9, cols in 1_usize..9, length in 1_usize..70, seed: u32) {
            let (a, b) = (vectors(rows, length, seed), vectors(cols, length, !seed));
            let expected = |a: &[f32], b: &[f32]| -> Vec<f64> {
                let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
                a.chunks(length).flat_map(|x| b.chunks(length).map(move |y| dot(x, y))).collect()
            };
            for (found, expected) in inner_products(&a, &b, length).iter().zip(expected(&a, &b)) {
                prop_assert!((found - expected).abs() <= 1e-13 * length as f64);
            }
            prop_assert_eq!(gram(&a, length), inner_products(&a, &a, length));
        }

        #[test]
        fn combinations_are_sums(inputs in 1_usize..7, outputs in 1_usize..10, length in 1_usize..140, seed: u32) {
            let x = vectors(inputs, length, seed);
            let weights: Vec<f64> = vectors(inputs, outputs, !seed).into_iter().map(f64::from).collect();
            let y = combine(&x, length, &weights, outputs);
            for j in 0..outputs {
                for i in 0..length {
                    let sum: f64 = (0..inputs).map(|k| weights[k * outputs + j] * f64::from(x[k * length + i])).sum();
                    prop_assert!((f64::from(y[j * length + i]) - sum).abs() <= 1e-6);
                }
            }
        }
    }
}
