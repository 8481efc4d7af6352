//! Stored element types, each in the order of lanes that is cheapest for it: a sum over them takes any order, as long as it is
//! the same on every level.

use super::wide::Wide;
use crate::kernels::Dtype;

/// How `2·WIDTH` neighbouring elements are read and written.
///
/// # Safety
/// As [`Wide`].
pub(super) trait Element {
    const DTYPE: Dtype;

    unsafe fn load<S: Wide>(pointer: *const u8) -> [S::Register; 2];
    unsafe fn store<S: Wide, const STREAM: bool>(pointer: *mut u8, values: [S::Register; 2]);
}

macro_rules! element {
    ($name:ident, $dtype:expr, $load:ident, $store:ident) => {
        pub(super) struct $name;

        impl Element for $name {
            const DTYPE: Dtype = $dtype;

            #[inline(always)]
            unsafe fn load<S: Wide>(pointer: *const u8) -> [S::Register; 2] {
                // SAFETY: passed on to the caller.
                unsafe { S::$load(pointer) }
            }

            #[inline(always)]
            unsafe fn store<S: Wide, const STREAM: bool>(pointer: *mut u8, values: [S::Register; 2]) {
                // SAFETY: passed on to the caller.
                unsafe { S::$store::<STREAM>(pointer, values) }
            }
        }
    };
}

element!(F32, Dtype::F32, load_f32, store_f32);
element!(Bf16, Dtype::Bf16, split_bf16, store_bf16);
element!(F16, Dtype::F16, load_f16, store_f16);
