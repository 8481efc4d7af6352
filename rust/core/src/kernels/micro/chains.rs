//! Multiply-adds in registers only, to measure the machine.

use super::{CHAINS, Kernels};
use crate::kernels::simd::Simd;

#[inline(always)]
pub(super) unsafe fn chains<S: Simd>(steps: usize) -> [S::Register; CHAINS] {
    // SAFETY: the contract of `Kernels` guarantees the CPU; both constants outlive the calls.
    unsafe {
        let (factor, addend) = (S::splat(&std::hint::black_box(0.5)), S::splat(&std::hint::black_box(1.0)));
        let mut chains = [addend; CHAINS];
        for _ in 0..steps {
            for chain in 0..CHAINS {
                chains[chain] = S::multiply_add(chains[chain], factor, addend);
            }
        }
        chains
    }
}

/// Runs `steps` fused multiply-adds in each lane of independent chains, in registers only. Returns the number of lanes.
pub(in crate::kernels) fn fused_chains<L: Kernels>(steps: usize) -> usize {
    // SAFETY: the caller has checked the level.
    std::hint::black_box(unsafe { L::chains(steps) });
    CHAINS * L::WIDTH
}
