//! The micro kernels, written once over [`Simd`] and compiled for every level.

use super::element::Element;
use super::formula::{Factor, Sums};
use crate::kernels::Simd;
use crate::kernels::{GROUP, LANES, Scalar, prefetch};

/// Elements that are summed in lanes before the lanes are added up. Both tensors' elements stay in L1 if a level
/// processes the lanes in parts.
const STRETCH: usize = 2048;
/// Prefetch distance in bytes. With streaming stores, prefetching slows things down.
const AHEAD: usize = 1 << 12;

/// The micro kernels of one level.
///
/// # Safety
/// For every function: the CPU has the level's instructions.
pub(super) trait Rows: Simd {
    /// Returns the sums of one token; both slices have the same number of elements.
    unsafe fn reduce<E: Element>(features: &[u8], reference: &[u8]) -> Sums;

    /// Writes scale·(d − share·h) of one token; all slices have the same number of elements. With `STREAM` the output
    /// is aligned to 64 bytes.
    unsafe fn differentiate<E: Element, const STREAM: bool>(
        features: &[u8],
        reference: &[u8],
        factor: Factor,
        output: &mut [u8],
    );
}

/// The part of a token beyond whole groups of 32 elements, padded with zeros.
struct Padded([u8; 4 * GROUP]);

impl Padded {
    #[inline(always)]
    fn new(rest: &[u8]) -> Self {
        let mut padded = Self([0; 4 * GROUP]);
        padded.0[..rest.len()].copy_from_slice(rest);
        padded
    }
}

#[inline(always)]
unsafe fn reduce<S: Simd, E: Element>(features: &[u8], reference: &[u8]) -> Sums {
    let size = E::DTYPE.size();
    let mut sums = Sums::default();
    for (features, reference) in features.chunks(STRETCH * size).zip(reference.chunks(STRETCH * size)) {
        let groups = features.len() / (GROUP * size);
        let (whole, rest) = features.split_at(groups * GROUP * size);
        let (reference_whole, reference_rest) = reference.split_at(whole.len());
        // SAFETY: `whole` has this many groups, a padded rest has one; the contract of `Rows` guarantees the CPU.
        unsafe {
            let mut totals = [S::wide_zero(); 3];
            for part in 0..LANES / S::WIDTH {
                let mut wide = [[S::wide_zero(); 2]; 3];
                add::<S, E>(whole.as_ptr(), reference_whole.as_ptr(), groups, part, &mut wide);
                if !rest.is_empty() {
                    let (rest, reference_rest) = (Padded::new(rest), Padded::new(reference_rest));
                    add::<S, E>(rest.0.as_ptr(), reference_rest.0.as_ptr(), 1, part, &mut wide);
                }
                for (total, [first, second]) in totals.iter_mut().zip(wide) {
                    let value = S::wide_add(first, second);
                    *total = if part == 0 { value } else { S::wide_add(*total, value) };
                }
            }
            let [squared, dot, norm] = totals;
            let (squared, dot, norm) = (S::wide_sum(squared), S::wide_sum(dot), S::wide_sum(norm));
            sums += Sums { squared, dot, norm };
        }
    }
    sums
}

/// Adds one part of the lanes of some groups to the sums.
#[inline(always)]
unsafe fn add<S: Simd, E: Element>(
    features: *const u8,
    reference: *const u8,
    groups: usize,
    part: usize,
    sums: &mut [[S::Wide; 2]; 3],
) {
    // SAFETY: the contract of this function guarantees the CPU and `groups` groups at both pointers.
    unsafe {
        for group in 0..groups {
            let offset = group * GROUP * E::DTYPE.size();
            if part == 0 {
                prefetch_group::<E>(features.wrapping_add(offset));
                prefetch_group::<E>(reference.wrapping_add(offset));
            }
            let h = E::load::<S>(features.add(offset), part);
            let h0 = E::load::<S>(reference.add(offset), part);
            for half in 0..2 {
                let d = S::widen(S::subtract(h[half], h0[half]));
                let h0 = S::widen(h0[half]);
                sums[0][half] = S::wide_multiply_add(d, d, sums[0][half]);
                sums[1][half] = S::wide_multiply_add(d, h0, sums[1][half]);
                sums[2][half] = S::wide_multiply_add(h0, h0, sums[2][half]);
            }
        }
    }
}

/// Prefetches the group that starts `AHEAD` bytes later.
#[inline(always)]
fn prefetch_group<E: Element>(pointer: *const u8) {
    for line in 0..E::DTYPE.size() / 2 {
        prefetch(pointer.wrapping_add(AHEAD + line * 64));
    }
}

#[inline(always)]
unsafe fn differentiate<S: Simd, E: Element, const STREAM: bool>(
    features: &[u8],
    reference: &[u8],
    factor: Factor,
    output: &mut [u8],
) {
    let size = E::DTYPE.size();
    let groups = features.len() / (GROUP * size);
    let (whole, rest) = features.split_at(groups * GROUP * size);
    let (reference_whole, reference_rest) = reference.split_at(whole.len());
    let (output_whole, output_rest) = output.split_at_mut(whole.len());
    // SAFETY: `whole` has this many groups, a padded rest has one; the contract of `Rows` guarantees CPU and alignment.
    unsafe {
        let constants = Constants::<S>::new(factor);
        let (features, reference) = (whole.as_ptr(), reference_whole.as_ptr());
        constants.write::<E, STREAM>(features, reference, groups, output_whole.as_mut_ptr());
        if !rest.is_empty() {
            let (rest, reference_rest) = (Padded::new(rest), Padded::new(reference_rest));
            let mut padded = Padded::new(&[]);
            constants.write::<E, false>(rest.0.as_ptr(), reference_rest.0.as_ptr(), 1, padded.0.as_mut_ptr());
            output_rest.copy_from_slice(&padded.0[..output_rest.len()]);
        }
    }
}

/// A token's factors in every lane.
struct Constants<S: Simd> {
    /// −share as a sum of two f32, precise enough that d − share·h is right even if it cancels.
    share: [S::Register; 2],
    /// Two numbers whose product is the scale. Neither leaves the range of f32 unless the result does.
    scale: [S::Register; 2],
}

impl<S: Simd> Constants<S> {
    #[inline(always)]
    unsafe fn new(factor: Factor) -> Self {
        let share = -factor.share as f32;
        let left = (-factor.share - f64::from(share)) as f32;
        let root = f64::from_bits(factor.scale.abs().sqrt().to_bits() & f64::INFINITY.to_bits());
        let [first, second] = [root as f32, (factor.scale / root) as f32];
        // SAFETY: the contract of `Rows` guarantees the CPU.
        let splat = |value: f32| unsafe { S::splat(&raw const value) };
        Self { share: [splat(share), splat(left)], scale: [splat(first), splat(second)] }
    }

    #[inline(always)]
    unsafe fn write<E: Element, const STREAM: bool>(
        &self,
        features: *const u8,
        reference: *const u8,
        groups: usize,
        output: *mut u8,
    ) {
        // SAFETY: the contract of `Rows` guarantees the CPU, `groups` groups at all pointers, and the alignment of
        // `output`.
        unsafe {
            for index in 0..groups * LANES / S::WIDTH {
                let (group, part) = (index * S::WIDTH / LANES, index % (LANES / S::WIDTH));
                let offset = group * GROUP * E::DTYPE.size();
                let h = E::load::<S>(features.add(offset), part);
                let h0 = E::load::<S>(reference.add(offset), part);
                let mut gradient = [S::zero(); 2];
                for half in 0..2 {
                    let d = S::subtract(h[half], h0[half]);
                    let across = S::multiply_add(self.share[0], h[half], d);
                    let across = S::multiply_add(self.share[1], h[half], across);
                    gradient[half] = S::multiply(S::multiply(across, self.scale[0]), self.scale[1]);
                }
                E::store::<S, STREAM>(output.add(offset), part, gradient);
            }
        }
    }
}

/// Compiles the micro kernels with a level's instructions.
macro_rules! rows {
    ($level:ty $(, #[$feature:meta])?) => {
        impl Rows for $level {
            $(#[$feature])?
            unsafe fn reduce<E: Element>(features: &[u8], reference: &[u8]) -> Sums {
                // SAFETY: the contracts are the same.
                unsafe { reduce::<Self, E>(features, reference) }
            }

            $(#[$feature])?
            unsafe fn differentiate<E: Element, const STREAM: bool>(
                features: &[u8],
                reference: &[u8],
                factor: Factor,
                output: &mut [u8],
            ) {
                // SAFETY: the contracts are the same.
                unsafe { differentiate::<Self, E, STREAM>(features, reference, factor, output) }
            }
        }
    };
}

rows!(Scalar);
#[cfg(target_arch = "x86_64")]
rows!(crate::kernels::Avx2, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
rows!(crate::kernels::Avx512, #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]);
