//! Products of many matrices V with thin factors X in one launch: Vᵀ·X or V·X, plus ‖V‖² of pairs.
//!
//! A [`Plan`] assigns work to blocks once. It is a table that is copied to the device and reused while its operands
//! stay in place ([`Plans`]).

use std::collections::VecDeque;
use std::sync::Arc;

use crate::argument::int;
use crate::device::Grid;
pub use crate::plan::{Form, Kind, Operand, Plan};
use crate::plan::{Group, WARPS};
use crate::{Cuda, CudaError, Dtype, Source};

/// Addresses that a launch reads and writes besides the operands.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// A copy of [`Plan::table`], 16-byte aligned.
    pub table: usize,
    /// float32: the results of all modules, [`Plan::results`] elements; or the lowest [`Operand::result`].
    pub results: usize,
    /// float32 scratch, [`Plan::partial`] elements.
    pub partial: usize,
    /// float64 scratch, [`Plan::partial_squares`] elements.
    pub partial_squares: usize,
    /// float32 [modules]: ‖V‖² in the order of the kinds; written only for pairs.
    pub squares: usize,
}

pub(crate) fn kernels() -> Vec<String> {
    let mut names: Vec<String> = ["add_chunks", "add_squares"].map(str::to_owned).into();
    for form in [Form::Transposed, Form::Straight] {
        for is_pair in [false, true] {
            for dtype in Dtype::ALL {
                names.extend([16, 32].map(|ranks| Kind { form, dtype, is_pair }.kernel(ranks)));
            }
        }
    }
    names
}

impl Cuda {
    /// Launches the products of a plan on `stream`.
    ///
    /// # Safety
    /// Every address, including those of the plan's operands, points to device memory with the described number of
    /// elements. The memory stays valid, and nothing else writes to it, until the stream has run the launches.
    ///
    /// # Errors
    /// If the kernels cannot be compiled, loaded or launched.
    pub unsafe fn products(&self, device: i32, stream: usize, plan: &Plan, memory: Memory) -> Result<(), CudaError> {
        let device = self.device(device)?;
        let library = self.library(&device, Source::SubspaceProjection)?;
        let Memory { mut table, results, partial, partial_squares, mut squares } = memory;
        device.on_stream(self.driver(), stream, |stream| {
            for group in &plan.groups {
                let [owners, finished, next] = group.starts().map(|start| table + start);
                let Group { kind, ranks, .. } = *group;
                let (length, tile) = (int("elements", group.length)?, int("elements", kind.tile())?);
                let grid = Grid { blocks: (group.owners[0].len(), 1), threads: 32 * WARPS as u32 };
                let parameters = (table, owners, length, results, partial, partial_squares);
                // SAFETY: Module*, int*, int, float*, float* and double*; addresses: this function's contract.
                unsafe { stream.launch(&library, &kind.kernel(ranks), grid, parameters)? };
                let grid = Grid { blocks: (group.owners[1].len(), 1), ..grid };
                let of_columns = i32::from(kind.form == Form::Transposed);
                let parameters = (table, finished, tile, int("columns", ranks)?, of_columns, results, partial);
                // SAFETY: Module*, int*, int, int, int, float* and float*; addresses: this function's contract.
                unsafe { stream.launch(&library, "add_chunks", grid, parameters)? };
                if kind.is_pair {
                    let grid = Grid { blocks: (group.modules.len(), 1), threads: 32 };
                    // SAFETY: Module*, double* and float*; addresses: this function's contract.
                    unsafe { stream.launch(&library, "add_squares", grid, (table, partial_squares, squares))? };
                }
                table = next;
                squares += group.modules.len() * size_of::<f32>();
            }
            Ok(())
        })
    }
}

/// A cache of plans, each with the caller's data for it (its table on the device).
///
/// A plan belongs to one stream: on another stream its table could be read before the upload, or freed while it is
/// read. The most recently used plans are kept. Plans that a CUDA graph reads at every replay are kept forever.
#[derive(Debug)]
pub struct Plans<Kept> {
    recent: VecDeque<(Request, Arc<Kept>)>,
    captured: Vec<Arc<Kept>>,
}

/// The key of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Device index and address of the stream.
    pub place: (i32, usize),
    /// The modules.
    pub modules: Vec<(Kind, Operand)>,
}

impl<Kept> Default for Plans<Kept> {
    fn default() -> Self {
        Self { recent: VecDeque::new(), captured: Vec::new() }
    }
}

impl<Kept> Plans<Kept> {
    /// Most recently used plans to keep.
    pub const MOST: usize = 16;

    /// Returns the plan for a request, calling `make` if there is none.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn find<Error>(
        &mut self,
        request: Request,
        is_captured: bool,
        make: impl FnOnce(&Request) -> Result<Kept, Error>,
    ) -> Result<Arc<Kept>, Error> {
        let known = self.recent.iter().position(|(known, _)| *known == request);
        let mut kept = known.and_then(|index| self.recent.remove(index)).map(|(_, kept)| kept);
        if kept.is_none() && is_captured {
            // Uploaded before the capture began, which waited for the device.
            let same = self.recent.iter().find(|(known, _)| known.modules == request.modules);
            let Some((_, found)) = same else {
                // The graph uploads it when it runs, so nothing else can use it.
                let made = Arc::new(make(&request)?);
                self.captured.push(Arc::clone(&made));
                return Ok(made);
            };
            kept = Some(Arc::clone(found));
        }
        let kept = match kept {
            Some(kept) => kept,
            None => Arc::new(make(&request)?),
        };
        if is_captured && !self.captured.iter().any(|known| Arc::ptr_eq(known, &kept)) {
            self.captured.push(Arc::clone(&kept));
        }
        self.recent.push_back((request, Arc::clone(&kept)));
        if self.recent.len() > Self::MOST {
            self.recent.pop_front();
        }
        Ok(kept)
    }

    /// Number of recently used plans, and of plans kept forever.
    #[must_use]
    pub fn counts(&self) -> [usize; 2] {
        [self.recent.len(), self.captured.len()]
    }
}
