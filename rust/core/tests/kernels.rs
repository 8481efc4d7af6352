//! Compares the products with V with sums in f64, and every level and number of threads bit for bit with plain Rust.

use proptest::prelude::*;
use safelora_fast_core::kernels::{Difference, Dtype, Engine, Level, Matrix};

/// A stored matrix that starts at an odd address and whose rows are padded with NaN.
#[derive(Clone, Debug)]
struct Stored {
    bytes: Vec<u8>,
    offset: usize,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl Stored {
    fn new(dtype: Dtype, [rows, cols, padding]: [usize; 3], offset: usize, mut value: impl FnMut() -> f32) -> Self {
        let row_stride = cols + padding;
        let mut bytes = vec![0xff; offset];
        for row in 0..rows {
            for col in 0..row_stride {
                if row == rows - 1 && col >= cols {
                    break;
                }
                encode(dtype, if col < cols { value() } else { f32::NAN }, &mut bytes);
            }
        }
        Self { bytes, offset, dtype, rows, cols, row_stride }
    }

    fn matrix(&self) -> Matrix<'_> {
        Matrix::new(&self.bytes[self.offset..], self.dtype, self.rows, self.cols, self.row_stride).expect("it fits")
    }

    fn value(&self, row: usize, col: usize) -> f32 {
        let size = self.dtype.size();
        let bytes = &self.bytes[self.offset + (row * self.row_stride + col) * size..][..size];
        match self.dtype {
            Dtype::F32 => f32::from_le_bytes(bytes.try_into().expect("four bytes")),
            Dtype::Bf16 => half::bf16::from_le_bytes(bytes.try_into().expect("two bytes")).to_f32(),
            Dtype::F16 => half::f16::from_le_bytes(bytes.try_into().expect("two bytes")).to_f32(),
        }
    }
}

fn encode(dtype: Dtype, value: f32, bytes: &mut Vec<u8>) {
    match dtype {
        Dtype::F32 => bytes.extend(value.to_le_bytes()),
        Dtype::Bf16 => bytes.extend(half::bf16::from_f32(value).to_le_bytes()),
        Dtype::F16 => bytes.extend(half::f16::from_f32(value).to_le_bytes()),
    }
}

/// Numbers in (-1, 1) from a seed.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }

    fn vector(&mut self, length: usize) -> Vec<f32> {
        (0..length).map(|_| self.next()).collect()
    }
}

struct Case {
    aligned: Stored,
    base: Stored,
    rank: usize,
    left: Vec<f32>,
    right: Vec<f32>,
    start: Vec<f32>,
}

/// Results of both products; outputs of `product` start as NaN, those of `transposed_product` as `start`.
struct Outcome {
    squares: f64,
    transposed: Vec<f32>,
    product: Vec<f32>,
}

impl Case {
    fn new(
        dtypes: [Dtype; 2],
        shape: [usize; 2],
        paddings: [usize; 2],
        offsets: [usize; 2],
        rank: usize,
        seed: u64,
    ) -> Self {
        let [rows, cols] = shape;
        let mut numbers = Numbers(seed);
        let aligned = Stored::new(dtypes[0], [rows, cols, paddings[0]], offsets[0], || numbers.next());
        let base = Stored::new(dtypes[1], [rows, cols, paddings[1]], offsets[1], || numbers.next());
        let left = numbers.vector(rank * rows);
        let right = numbers.vector(rank * cols);
        let start = numbers.vector(rank * cols);
        Self { aligned, base, rank, left, right, start }
    }

    fn difference(&self) -> Difference<'_> {
        Difference::new(self.aligned.matrix(), self.base.matrix()).expect("one shape")
    }

    fn value(&self, row: usize, col: usize) -> f64 {
        f64::from(self.aligned.value(row, col) - self.base.value(row, col))
    }

    fn run(&self, engine: &mut Engine) -> Outcome {
        let v = self.difference();
        let mut transposed = self.start.clone();
        let squares = engine.transposed_product(&v, &self.left, self.rank, &mut transposed).expect("shapes fit");
        let mut product = vec![f32::NAN; self.rank * v.rows()];
        engine.product(&v, &self.right, self.rank, &mut product).expect("shapes fit");
        Outcome { squares, transposed, product }
    }

    /// Compares with the products in f64, within the bounds of their rounding errors.
    fn check(&self, outcome: &Outcome) -> Result<(), TestCaseError> {
        let (rows, cols) = (self.aligned.rows, self.aligned.cols);
        let squares: f64 =
            (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))).map(|(i, j)| self.value(i, j).powi(2)).sum();
        prop_assert!((outcome.squares - squares).abs() <= 1e-6 * squares, "{} {squares}", outcome.squares);
        for k in 0..self.rank {
            for j in 0..cols {
                let mut sum = f64::from(self.start[k * cols + j]);
                let mut magnitude = sum.abs();
                for i in 0..rows {
                    let term = self.value(i, j) * f64::from(self.left[k * rows + i]);
                    sum += term;
                    magnitude += term.abs();
                }
                let ours = f64::from(outcome.transposed[k * cols + j]);
                prop_assert!((ours - sum).abs() <= 1e-6 * magnitude, "column {j} of vector {k}: {ours} not {sum}");
            }
            for i in 0..rows {
                let terms = (0..cols).map(|j| self.value(i, j) * f64::from(self.right[k * cols + j]));
                let (sum, magnitude) =
                    terms.fold((0.0, 0.0), |(sum, magnitude), term| (sum + term, magnitude + term.abs()));
                let ours = f64::from(outcome.product[k * rows + i]);
                prop_assert!((ours - sum).abs() <= 1e-6 * magnitude, "row {i} of vector {k}: {ours} not {sum}");
            }
        }
        Ok(())
    }
}

fn engine(threads: usize, level: Level) -> Engine {
    Engine::new(threads, level).expect("the level is available")
}

fn levels() -> impl Iterator<Item = Level> {
    Level::ALL.into_iter().filter(|level| level.is_available())
}

/// One engine for each level with one and with three threads, plain Rust first.
fn engines() -> Vec<Engine> {
    levels().flat_map(|level| [engine(1, level), engine(3, level)]).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn same(case: &Case, engines: &mut [Engine], check: bool) -> Result<(), TestCaseError> {
    let expected = case.run(&mut engines[0]);
    if check {
        case.check(&expected)?;
    }
    for engine in engines {
        let outcome = case.run(engine);
        let name = (engine.level(), engine.threads());
        prop_assert_eq!(outcome.squares.to_bits(), expected.squares.to_bits(), "{:?}", name);
        prop_assert_eq!(bits(&outcome.transposed), bits(&expected.transposed), "transposed, {:?}", name);
        prop_assert_eq!(bits(&outcome.product), bits(&expected.product), "product, {:?}", name);
    }
    Ok(())
}

fn dtype() -> impl Strategy<Value = Dtype> {
    prop::sample::select(vec![Dtype::F32, Dtype::Bf16, Dtype::F16])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn small_matrices(
        dtypes in [dtype(), dtype()],
        shape in [0_usize..70, 0_usize..130],
        paddings in [0_usize..5, 0_usize..5],
        offsets in [0_usize..65, 0_usize..65],
        rank in prop::sample::select(vec![0_usize, 1, 2, 3, 7, 8, 13, 16, 17, 64]),
        seed in any::<u64>(),
    ) {
        same(&Case::new(dtypes, shape, paddings, offsets, rank, seed), &mut engines(), true)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn several_blocks(
        dtypes in [dtype(), dtype()],
        shape in [100_usize..400, 400_usize..1700],
        offsets in [0_usize..65, 0_usize..65],
        rank in 0_usize..40,
        seed in any::<u64>(),
    ) {
        same(&Case::new(dtypes, shape, [3, 0], offsets, rank, seed), &mut engines(), true)?;
    }
}

#[test]
fn large_ranks() {
    for rank in [320, 601] {
        let case = Case::new([Dtype::Bf16, Dtype::Bf16], [133, 1100], [0, 0], [0, 2], rank, 7);
        same(&case, &mut engines(), true).expect("all levels agree");
    }
}

#[test]
fn a_reused_engine_forgets_the_last_call() {
    let cases = [(300, 700, 20), (5, 33, 3), (300, 700, 20), (129, 40, 0), (7, 513, 65)];
    for level in levels() {
        let mut reused = engine(2, level);
        for (rows, cols, rank) in cases {
            let case = Case::new([Dtype::Bf16, Dtype::F16], [rows, cols], [1, 0], [1, 0], rank, 3);
            let (ours, fresh) = (case.run(&mut reused), case.run(&mut engine(2, level)));
            assert_eq!(bits(&ours.transposed), bits(&fresh.transposed));
            assert_eq!(bits(&ours.product), bits(&fresh.product));
        }
    }
}

#[test]
fn squares_outside_the_range_of_f32() {
    for level in levels() {
        let mut engine = engine(2, level);
        for value in [1e-30_f32, 3e-23, 1e25] {
            let aligned = Stored::new(Dtype::F32, [150, 70, 0], 0, || value);
            let base = Stored::new(Dtype::F32, [150, 70, 0], 0, || 0.0);
            let v = Difference::new(aligned.matrix(), base.matrix()).expect("one shape");
            let squares = engine.transposed_product(&v, &[], 0, &mut []).expect("shapes fit");
            let expected = 150.0 * 70.0 * f64::from(value).powi(2);
            assert!((squares - expected).abs() < 1e-6 * expected, "{squares:e} not {expected:e}");
        }
    }
}

#[test]
fn a_zero_difference_is_exactly_zero() {
    let case = Case::new([Dtype::Bf16, Dtype::Bf16], [140, 100], [0, 0], [0, 0], 3, 1);
    let v = Difference::new(case.aligned.matrix(), case.aligned.matrix()).expect("one shape");
    for level in levels() {
        let mut y = vec![0.0; 300];
        let squares = engine(2, level).transposed_product(&v, &case.left, 3, &mut y).expect("shapes fit");
        assert_eq!(squares.to_bits(), 0.0_f64.to_bits());
        assert!(y.iter().all(|value| *value == 0.0));
    }
}

#[test]
fn a_single_bad_weight_shows() {
    for level in levels() {
        let mut engine = engine(2, level);
        for (dtype, bad) in [(Dtype::F32, f32::NAN), (Dtype::Bf16, f32::INFINITY), (Dtype::F16, f32::NEG_INFINITY)] {
            for position in [0, 127 * 41 + 40, 139 * 41 + 40] {
                let mut index = 0;
                let aligned = Stored::new(dtype, [140, 41, 0], 0, || {
                    index += 1;
                    if index == position + 1 { bad } else { 0.5 }
                });
                let base = Stored::new(dtype, [140, 41, 0], 0, || 0.25);
                let v = Difference::new(aligned.matrix(), base.matrix()).expect("one shape");
                let squares = engine.transposed_product(&v, &[], 0, &mut []).expect("shapes fit");
                assert!(!squares.is_finite(), "{bad} at {position}");
            }
        }
    }
}

#[test]
fn wrong_lengths_are_refused() {
    let case = Case::new([Dtype::F32, Dtype::F32], [4, 5], [0, 0], [0, 0], 2, 1);
    let v = case.difference();
    let mut engine = engine(1, Level::Scalar);
    assert!(engine.transposed_product(&v, &[0.0; 7], 2, &mut [0.0; 10]).is_err());
    assert!(engine.transposed_product(&v, &[0.0; 8], 2, &mut [0.0; 9]).is_err());
    assert!(engine.product(&v, &[0.0; 10], 2, &mut [0.0; 10]).is_err());
    assert!(engine.product(&v, &[0.0; 8], 2, &mut [0.0; 8]).is_err());
}

/// A digest (FNV-1a) of both products of several shapes and dtypes: the same input must give the same bits in every
/// release, because a cosine decides whether a module is projected.
#[test]
fn the_bits_of_earlier_releases() {
    for mut engine in engines() {
        let mut digest = 0xcbf2_9ce4_8422_2325_u64;
        let mut add = |word: u64| digest = (digest ^ word).wrapping_mul(0x0100_0000_01b3);
        for (rows, cols) in [(5, 33), (64, 65), (1100, 97), (90, 700)] {
            for rank in [1, 7, 8, 13] {
                let case = Case::new([Dtype::Bf16, Dtype::F16], [rows, cols], [1, 0], [2, 0], rank, rank as u64);
                let outcome = case.run(&mut engine);
                add(outcome.squares.to_bits());
                bits(&outcome.transposed).into_iter().chain(bits(&outcome.product)).for_each(|word| add(word.into()));
            }
        }
        assert_eq!(digest, 0x38fa_9610_8250_325c, "{:?} with {} threads", engine.level(), engine.threads());
    }
}
