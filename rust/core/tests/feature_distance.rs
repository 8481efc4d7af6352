//! Compares the feature distance with its definition in f64, and every level and number of threads bit for bit with
//! plain Rust.

use proptest::prelude::*;
use safelora_fast_core::feature_distance::{Factor, Gradient, Normalize, Pair, Sequences, States, backward, forward};
use safelora_fast_core::kernels::{Dtype, Engine, Level};

/// States at an odd address, with NaN between the rows.
#[derive(Clone, Debug)]
struct Stored {
    bytes: Vec<u8>,
    offset: usize,
    dtype: Dtype,
    shape: [usize; 3],
    strides: [usize; 2],
}

impl Stored {
    fn new(
        dtype: Dtype,
        shape: [usize; 3],
        padding: [usize; 2],
        offset: usize,
        mut value: impl FnMut(usize) -> f32,
    ) -> Self {
        let [batch, tokens, hidden] = shape;
        let token_stride = (hidden + padding[0]).max(1);
        let strides = [tokens * token_stride + padding[1], token_stride];
        let mut bytes = vec![0xff; offset];
        for element in 0..batch * strides[0] {
            let (token, column) = (element % strides[0] / token_stride, element % strides[0] % token_stride);
            let is_value = token < tokens && column < hidden;
            let row = element / strides[0] * tokens + token;
            encode(dtype, if is_value { value(row) } else { f32::NAN }, &mut bytes);
        }
        Self { bytes, offset, dtype, shape, strides }
    }

    fn states(&self) -> States<'_> {
        States::new(&self.bytes[self.offset..], self.dtype, self.shape, self.strides).expect("it fits")
    }

    fn rows(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    fn row(&self, row: usize) -> Vec<f64> {
        let [_, tokens, hidden] = self.shape;
        let start = row / tokens * self.strides[0] + row % tokens * self.strides[1];
        (start..start + hidden).map(|element| decode(self.dtype, &self.bytes[self.offset..], element)).collect()
    }
}

fn encode(dtype: Dtype, value: f32, bytes: &mut Vec<u8>) {
    match dtype {
        Dtype::F32 => bytes.extend(value.to_le_bytes()),
        Dtype::Bf16 => bytes.extend(half::bf16::from_f32(value).to_le_bytes()),
        Dtype::F16 => bytes.extend(half::f16::from_f32(value).to_le_bytes()),
    }
}

fn decode(dtype: Dtype, bytes: &[u8], element: usize) -> f64 {
    let bytes = &bytes[element * dtype.size()..][..dtype.size()];
    match dtype {
        Dtype::F32 => f64::from(f32::from_le_bytes(bytes.try_into().expect("four bytes"))),
        Dtype::Bf16 => f64::from(half::bf16::from_le_bytes(bytes.try_into().expect("two bytes")).to_f32()),
        Dtype::F16 => f64::from(half::f16::from_le_bytes(bytes.try_into().expect("two bytes")).to_f32()),
    }
}

/// Numbers in (-1, 1) from a seed.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }

    /// Numbers of such different magnitudes that any change in the order of a sum changes its bits.
    fn spread(&mut self) -> f32 {
        self.next() * 2.0_f32.powi(self.below(12) as i32 - 6)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Two layers of one batch; tokens that do not count hold NaN.
#[derive(Clone, Debug)]
struct Case {
    blocks: Vec<[Stored; 2]>,
    mask: Vec<bool>,
    segments: Vec<i64>,
    normalize: Normalize,
}

/// Results of both directions; gradients start as NaN.
struct Outcome {
    distance: f64,
    gradients: Vec<Vec<u8>>,
}

impl Case {
    fn new(
        dtypes: [Dtype; 2],
        shape: [usize; 3],
        padding: [usize; 2],
        offset: usize,
        normalize: Normalize,
        seed: u64,
    ) -> Self {
        let mut numbers = Numbers(seed);
        let rows = shape[0] * shape[1];
        let mask: Vec<bool> = (0..rows).map(|_| numbers.below(4) > 0).collect();
        let segments = (0..rows).map(|_| numbers.below(3).cast_signed() - 1).collect();
        let drift = 10.0_f32.powi(-(numbers.below(4) as i32));
        let blocks = dtypes
            .iter()
            .map(|&dtype| {
                let mut numbers = Numbers(numbers.below(1 << 30));
                let reference = Stored::new(dtype, shape, padding, offset, |row| {
                    let value = numbers.spread();
                    if mask[row] { value } else { f32::NAN }
                });
                let mut values = (0..rows).flat_map(|row| reference.row(row)).collect::<Vec<_>>().into_iter();
                let features = Stored::new(dtype, shape, [padding[1], padding[0]], offset / 2, |_| {
                    values.next().expect("as many") as f32 * (1.0 + drift) + drift * numbers.spread()
                });
                [features, reference]
            })
            .collect();
        Self { blocks, mask, segments, normalize }
    }

    fn run(&self, engine: &Engine) -> Outcome {
        let [batch, tokens, hidden] = self.blocks[0][0].shape;
        let sequences = Sequences::new(
            [batch, tokens],
            |row, token| self.mask[row * tokens + token],
            |row, token| self.segments[row * tokens + token],
        );
        let pairs: Vec<Pair<'_>> =
            self.blocks.iter().map(|[h, h0]| Pair::new(h.states(), h0.states()).expect("one shape")).collect();
        let rows = batch * tokens;
        let mut factors = vec![Factor { scale: f64::NAN, share: f64::NAN }; pairs.len() * rows];
        let distance = forward(engine, &pairs, &sequences, self.normalize, &mut factors).expect("shapes fit");
        let sizes: Vec<usize> = self.blocks.iter().map(|[h, _]| rows * hidden * h.dtype.size()).collect();
        let mut memory: Vec<Vec<u8>> = sizes.iter().map(|size| vec![0xff; size + 64]).collect();
        let outputs = memory.iter_mut().zip(&sizes).map(|(memory, size)| {
            let start = memory.as_ptr().align_offset(64);
            &mut memory[start..start + size]
        });
        let per_block = factors.chunks(rows.max(1)).chain(std::iter::repeat(&[][..]));
        let mut wanted: Vec<Gradient<'_>> = pairs
            .iter()
            .zip(per_block)
            .zip(outputs)
            .map(|((block, factors), output)| Gradient { block: *block, factors, output })
            .collect();
        backward(engine, &mut wanted, WEIGHT).expect("shapes fit");
        let gradients = wanted.into_iter().map(|gradient| gradient.output.to_vec()).collect();
        Outcome { distance, gradients }
    }

    /// Tokens that are scaled to unit length together.
    fn units(&self) -> Vec<Vec<usize>> {
        let tokens = self.blocks[0][0].shape[1];
        let counted = (0..self.mask.len()).filter(|row| self.mask[*row]);
        if self.normalize != Normalize::Sequence {
            return counted.map(|row| vec![row]).collect();
        }
        let mut units: Vec<((usize, i64), Vec<usize>)> = Vec::new();
        for row in counted {
            let key = (row / tokens, self.segments[row]);
            match units.iter_mut().find(|(known, _)| *known == key) {
                Some((_, rows)) => rows.push(row),
                None => units.push((key, vec![row])),
            }
        }
        units.into_iter().map(|(_, rows)| rows).collect()
    }

    fn sequences(&self) -> f64 {
        let tokens = self.blocks[0][0].shape[1].max(1);
        let mut keys: Vec<_> =
            (0..self.mask.len()).filter(|row| self.mask[*row]).map(|row| (row / tokens, self.segments[row])).collect();
        keys.sort_unstable();
        keys.dedup();
        keys.len().max(1) as f64
    }

    /// ‖x − x₀‖² of the flattened, scaled units in f64, the error that f32 differences may cause, and the gradient by
    /// the chain rule, layer by layer.
    fn definition(&self) -> (f64, f64, Vec<Expected>) {
        let (mut distance, mut tolerance) = (0.0, 0.0);
        let mut gradients = Vec::new();
        for [features, reference] in &self.blocks {
            let hidden = features.shape[2];
            let mut expected = Expected { values: vec![0.0; features.rows() * hidden], inexact: 0.0, terms: 0.0 };
            for unit in self.units() {
                let h: Vec<f64> = unit.iter().flat_map(|row| features.row(*row)).collect();
                let h0: Vec<f64> = unit.iter().flat_map(|row| reference.row(*row)).collect();
                let norm = |values: &[f64]| match self.normalize {
                    Normalize::None => 1.0,
                    _ => length(values),
                };
                let (p, q) = (norm(&h), norm(&h0));
                let unit_of = |value: f64, length: f64| if length == 0.0 { 0.0 } else { value / length };
                let x: Vec<f64> = h.iter().map(|value| unit_of(*value, p)).collect();
                let gap: Vec<f64> = h0.iter().zip(&x).map(|(value, x)| x - unit_of(*value, q)).collect();
                distance += gap.iter().map(|gap| gap * gap).sum::<f64>() / self.sequences();
                let along: f64 = gap.iter().zip(&x).map(|(gap, x)| gap * x).sum();
                let values = gap.iter().zip(&x).map(|(gap, x)| match self.normalize {
                    Normalize::None => 2.0 * gap,
                    _ if p == 0.0 || q == 0.0 => 0.0,
                    _ => 2.0 * (gap - along * x) / p,
                });
                let positions = unit.iter().flat_map(|row| row * hidden..(row + 1) * hidden);
                let mut slope = 0.0;
                for (position, value) in positions.zip(values) {
                    expected.values[position] = WEIGHT * value / self.sequences();
                    slope += value * value;
                }
                let d = length(&h.iter().zip(&h0).map(|(h, h0)| h - h0).collect::<Vec<_>>());
                expected.terms += 2.0 * unit_of(1.0 + unit_of(d, q) * (1.0 + unit_of(q + d, p)), p);
                let rounded = h.iter().zip(&h0).map(|(h, h0)| h - h0).filter(|d| f64::from(*d as f32) - d != 0.0);
                let rounded = length(&rounded.collect::<Vec<_>>());
                expected.inexact += rounded * unit_of(2.0, p * q);
                tolerance += HALF_ULP * rounded * (slope.sqrt() + HALF_ULP * rounded * unit_of(1.0, p * q));
                tolerance += 1e-15 * (1.0 + unit_of(d * d, p * q));
            }
            gradients.push(expected);
        }
        (distance, tolerance, gradients)
    }

    fn check(&self, outcome: &Outcome) -> Result<(), TestCaseError> {
        let (distance, tolerance, gradients) = self.definition();
        for (([features, _], expected), gradient) in self.blocks.iter().zip(gradients).zip(&outcome.gradients) {
            let ours = (0..expected.values.len()).map(|element| decode(features.dtype, gradient, element));
            let error = length(&ours.zip(&expected.values).map(|(ours, value)| ours - value).collect::<Vec<_>>());
            // Relative rounding, and half of the smallest number.
            let (rounding, smallest) = match features.dtype {
                Dtype::F32 => (2e-7, 0.0),
                Dtype::F16 => (2.0_f64.powi(-11), 2.0_f64.powi(-25)),
                Dtype::Bf16 => (2.0_f64.powi(-8), 0.0),
            };
            let size = length(&expected.values);
            let elements = expected.values.len() as f64;
            let tolerance = rounding * size
                + smallest * elements.sqrt()
                + 2.0 * HALF_ULP * expected.inexact
                + 1e-15 * expected.terms;
            prop_assert!(error <= tolerance, "gradient off by {error:e} of {size:e}");
        }
        let close = (outcome.distance - distance).abs() <= 1e-14 * distance + tolerance;
        prop_assert!(close, "{:e} not {distance:e} within {tolerance:e}", outcome.distance);
        Ok(())
    }
}

/// The gradient of one layer.
struct Expected {
    values: Vec<f64>,
    /// Magnitude of the factor of d if h − h₀ is inexact in f32: its rounding is visible if the gradient cancels.
    inexact: f64,
    /// Magnitude of the terms whose difference is the gradient. If they cancel, as for a hidden size of one, the f64
    /// rounding of both computations is visible.
    terms: f64,
}

fn length(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

const WEIGHT: f64 = 0.7;

/// The rounding error of an f32.
const HALF_ULP: f64 = 1.0 / (1_u64 << 24) as f64;

fn engine(threads: usize, level: Level) -> Engine {
    Engine::new(threads, level).expect("the level is available")
}

/// One engine for each level with one and with three threads, plain Rust first.
fn engines() -> Vec<Engine> {
    let levels = Level::ALL.into_iter().filter(|level| level.is_available());
    levels.flat_map(|level| [engine(1, level), engine(3, level)]).collect()
}

fn same(case: &Case) -> Result<(), TestCaseError> {
    let engines = engines();
    let expected = case.run(&engines[0]);
    case.check(&expected)?;
    for engine in engines {
        let outcome = case.run(&engine);
        let name = (engine.level(), engine.threads());
        prop_assert_eq!(outcome.distance.to_bits(), expected.distance.to_bits(), "{:?}", name);
        prop_assert!(outcome.gradients == expected.gradients, "gradients of {:?}", name);
    }
    Ok(())
}

fn dtype() -> impl Strategy<Value = Dtype> {
    prop::sample::select(vec![Dtype::F32, Dtype::Bf16, Dtype::F16])
}

fn normalize() -> impl Strategy<Value = Normalize> {
    prop::sample::select(vec![Normalize::Sequence, Normalize::Token, Normalize::None])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn small_states(
        dtypes in [dtype(), dtype()],
        shape in [0_usize..4, 0_usize..9, 0_usize..140],
        padding in [0_usize..4, 0_usize..7],
        offset in 0_usize..65,
        normalize in normalize(),
        seed in any::<u64>(),
    ) {
        same(&Case::new(dtypes, shape, padding, offset, normalize, seed))?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn several_units_and_stretches(
        dtypes in [dtype(), dtype()],
        shape in [1_usize..4, 20_usize..60, 1500_usize..5000],
        offset in 0_usize..65,
        normalize in normalize(),
        seed in any::<u64>(),
    ) {
        same(&Case::new(dtypes, shape, [0, 0], offset, normalize, seed))?;
    }
}

#[test]
fn gradients_that_are_streamed_past_the_caches() {
    for (dtype, hidden) in [(Dtype::F32, 4096), (Dtype::Bf16, 8192), (Dtype::F16, 8192)] {
        same(&Case::new([dtype, dtype], [2, 40, hidden], [0, 3], 3, Normalize::Sequence, 5)).expect("all levels agree");
    }
}

/// h = (1 + drift)·h₀ + aside: ‖d‖² − (p − q)² cancels to the square of `aside`.
#[test]
fn states_that_grow_along_themselves() {
    let mut numbers = Numbers(3);
    let shape = [1, 30, 500];
    let reference = Stored::new(Dtype::F32, shape, [0, 0], 0, |_| numbers.next());
    let mut values = (0..30).flat_map(|row| reference.row(row)).collect::<Vec<_>>().into_iter();
    let features = Stored::new(Dtype::F32, shape, [0, 0], 0, |_| {
        values.next().expect("as many") as f32 * 1.01 + 1e-6 * numbers.next()
    });
    let case = Case {
        blocks: vec![[features, reference]],
        mask: vec![true; 30],
        segments: vec![0; 30],
        normalize: Normalize::Sequence,
    };
    let (distance, _, _) = case.definition();
    assert!((1e-13..1e-10).contains(&distance), "{distance:e}");
    for engine in engines() {
        let outcome = case.run(&engine);
        assert!((outcome.distance - distance).abs() < 1e-7 * distance, "{:e} not {distance:e}", outcome.distance);
        case.check(&outcome).expect("the gradient is true too");
    }
}

#[test]
fn a_bad_value_shows_where_it_counts() {
    for (bad, dtype) in [(f32::NAN, Dtype::F32), (f32::INFINITY, Dtype::Bf16), (f32::NEG_INFINITY, Dtype::F16)] {
        for normalize in [Normalize::Sequence, Normalize::Token, Normalize::None] {
            let states =
                |bad_row| Stored::new(dtype, [2, 3, 40], [0, 0], 0, |row| if row == bad_row { bad } else { 0.5 });
            let (fine, foul) = (states(usize::MAX), states(4));
            for blocks in [[fine.clone(), foul.clone()], [foul, fine]] {
                let case = |mask| Case { blocks: vec![blocks.clone()], mask, segments: vec![0; 6], normalize };
                let hidden = case(vec![true, true, true, true, false, true]);
                for engine in engines() {
                    assert!(!case(vec![true; 6]).run(&engine).distance.is_finite());
                    assert!(hidden.run(&engine).distance < 1e-12);
                }
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let bytes = [0_u8; 4 * 24];
    let states = |shape| States::new(&bytes, Dtype::F32, shape, [shape[1] * shape[2], shape[2]]);
    assert!(states([2, 3, 4]).is_ok());
    assert!(states([2, 3, 5]).is_err());
    assert!(States::new(&bytes, Dtype::F32, [2, 3, 4], [13, 4]).is_err());
    assert!(States::new(&bytes, Dtype::F32, [usize::MAX, 3, 4], [0, 0]).is_err());
    assert!(States::new(&bytes, Dtype::F32, [2, 2, 4], [usize::MAX, 4]).is_err());
    assert!(States::new(&[], Dtype::F32, [2, 3, 0], [5, 7]).is_ok());
    let (one, other) = (states([2, 3, 4]).expect("it fits"), states([3, 2, 4]).expect("it fits"));
    assert!(Pair::new(one, other).is_err());
    let block = Pair::new(one, one).expect("one shape");
    let engine = engine(1, Level::Scalar);
    let sequences = |tokens| Sequences::new([2, tokens], |_, _| true, |_, _| 0);
    let run = |tokens, count| {
        forward(&engine, &[block], &sequences(tokens), Normalize::None, &mut vec![Factor::default(); count])
    };
    assert_eq!(run(3, 6), Ok(0.0));
    assert!(run(3, 5).is_err());
    assert!(run(2, 4).is_err());
    let factors = [Factor::default(); 6];
    for (count, size) in [(5, 96), (6, 95), (6, 97)] {
        let mut output = vec![0xff_u8; size];
        let mut gradients = [Gradient { block, factors: &factors[..count], output: &mut output }];
        assert!(backward(&engine, &mut gradients, 1.0).is_err());
        assert!(output.iter().all(|byte| *byte == 0xff));
    }
}
