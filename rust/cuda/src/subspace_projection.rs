//! Products of many matrices V with thin factors X, all in one launch: Vᵀ·X or V·X, and ‖V‖² of pairs on the way.
//!
//! Which block computes what is settled once, in a [`Plan`]: a table that is copied to the device and kept for as long as its
//! operands stay where they are ([`Plans`]). Blocks are alike but for those at edges, so none waits for a long one at the end, and the
//! order of a launch is that of the modules. How a module is cut depends on shapes alone, and so do the bits of its result.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::argument::int;
use crate::device::Grid;
use crate::{Cuda, CudaError, Dtype, Source};

/// Warps of a block in the kernels' source.
const WARPS: usize = 4;
/// Bytes of one load.
const WIDE: usize = 16;
/// Elements of the contraction that a block takes, from the most to the least; all are multiples of what a step takes.
const LENGTHS: [usize; 6] = [4096, 2048, 1024, 512, 256, 128];
/// Blocks that keep any GPU busy to the end, where the work suffices.
const ENOUGH: usize = 2048;

/// Which product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Vᵀ·X, over the rows of V.
    Transposed,
    /// V·X, over its columns.
    Straight,
}

/// What the matrices of one launch are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Which product.
    pub form: Form,
    /// Element type of all.
    pub dtype: Dtype,
    /// V is aligned − base, rather than one matrix.
    pub is_pair: bool,
}

/// One module's operands, by their addresses on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// [rows, columns] with contiguous columns.
    pub aligned: usize,
    /// Likewise; of no meaning where there is no pair.
    pub base: usize,
    /// Elements from row to row.
    pub aligned_stride: usize,
    /// Likewise.
    pub base_stride: usize,
    /// Rows and columns of V.
    pub shape: (usize, usize),
    /// float32, contiguous, at a multiple of 16 bytes: [rows, rank] for the transposed form, else [columns, rank].
    pub factor: usize,
    /// Columns of X.
    pub rank: usize,
}

/// As `Module` in the kernels' source.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Module {
    aligned: usize,
    base: usize,
    factor: usize,
    aligned_stride: i64,
    base_stride: i64,
    result: i64,
    rows: i32,
    columns: i32,
    rank: i32,
    is_aligned: i32,
    tiles: i32,
    chunks: i32,
    first: i32,
    first_finished: i32,
}

/// How the work of one launch is cut: modules of one kind.
#[derive(Clone, Debug)]
struct Group {
    kind: Kind,
    ranks: usize,
    length: usize,
    modules: Vec<Module>,
    /// The module of each block, and of each block that adds chunks.
    owners: [Vec<i32>; 2],
    /// Elements of the results of this group and those before.
    results: usize,
}

/// Products of modules of any kinds: a launch for each kind.
#[derive(Clone, Debug)]
pub struct Plan {
    groups: Vec<Group>,
    /// Of each module, in the order given: first element of its result, and place among the squares.
    places: Vec<(usize, usize)>,
}

/// Addresses of what a launch reads and writes besides the operands.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// A copy of [`Plan::table`], at a multiple of 16 bytes.
    pub table: usize,
    /// float32: the results of all modules, [`Plan::results`] elements.
    pub results: usize,
    /// float32 for its own use, [`Plan::partial`] elements.
    pub partial: usize,
    /// float64 for its own use, [`Plan::partial_squares`] elements.
    pub partial_squares: usize,
    /// float32 [modules]: ‖V‖² in the order of the kinds; written for pairs alone.
    pub squares: usize,
}

impl Plan {
    /// Cuts the work.
    ///
    /// # Errors
    /// When there is no operand, or one is larger than a kernel can count.
    pub fn new(modules: &[(Kind, Operand)]) -> Result<Self, CudaError> {
        let mut kinds: Vec<Kind> = Vec::new();
        for (kind, _) in modules {
            if !kinds.contains(kind) {
                kinds.push(*kind);
            }
        }
        let mut plan = Self { groups: Vec::new(), places: vec![(0, 0); modules.len()] };
        let (mut results, mut square) = (0, 0);
        for kind in kinds {
            let chosen: Vec<usize> = (0..modules.len()).filter(|index| modules[*index].0 == kind).collect();
            let operands: Vec<Operand> = chosen.iter().map(|index| modules[*index].1).collect();
            let group = Group::new(kind, &operands, results)?;
            for (module, index) in group.modules.iter().zip(chosen) {
                plan.places[index] = (module.result as usize, square);
                square += 1;
            }
            results = group.results;
            plan.groups.push(group);
        }
        if plan.groups.is_empty() {
            return Err(CudaError::Operands("there is nothing to multiply".to_owned()));
        }
        Ok(plan)
    }

    /// What is copied to the device.
    #[must_use]
    pub fn table(&self) -> Vec<u8> {
        let mut table = Vec::new();
        for group in &self.groups {
            group.write(&mut table);
        }
        table
    }

    /// Of each module, in the order given: first element of its result, [columns or rows of V, rank], and place among the squares.
    #[must_use]
    pub fn places(&self) -> &[(usize, usize)] {
        &self.places
    }

    /// Elements of all results.
    #[must_use]
    pub fn results(&self) -> usize {
        self.groups.last().map_or(0, |group| group.results)
    }

    /// Elements that sums of chunks take; launches of one stream take turns.
    #[must_use]
    pub fn partial(&self) -> usize {
        self.groups.iter().map(Group::partial).max().unwrap_or(0)
    }

    /// Elements that squares take.
    #[must_use]
    pub fn partial_squares(&self) -> usize {
        self.groups.iter().map(Group::partial_squares).max().unwrap_or(0)
    }
}

impl Group {
    fn new(kind: Kind, operands: &[Operand], results: usize) -> Result<Self, CudaError> {
        let widest = operands.iter().map(|operand| operand.rank).max().unwrap_or(0);
        let ranks = if widest <= 16 { 16 } else { 32 };
        let blocks = |length: usize| -> usize {
            operands
                .iter()
                .map(|operand| kind.tiles(operand) * kind.chunks(operand, length) * operand.rank.div_ceil(ranks))
                .sum()
        };
        let length = LENGTHS.into_iter().find(|length| blocks(*length) >= ENOUGH).unwrap_or(LENGTHS[LENGTHS.len() - 1]);
        int("blocks", blocks(length))?;
        let mut group = Self { kind, ranks, length, modules: Vec::new(), owners: [Vec::new(), Vec::new()], results };
        for (index, operand) in operands.iter().enumerate() {
            group.add(int("modules", index)?, operand)?;
        }
        Ok(group)
    }

    fn add(&mut self, index: i32, operand: &Operand) -> Result<(), CudaError> {
        let size = self.kind.dtype.size();
        let (rows, columns) = operand.shape;
        let places = match self.kind.form {
            Form::Transposed => columns,
            Form::Straight => rows,
        };
        if !operand.factor.is_multiple_of(WIDE) || operand.rank == 0 {
            return Err(CudaError::Operands(format!(
                "a factor of {} columns at {:#x}; it must have some, and lie at a multiple of {WIDE} bytes",
                operand.rank, operand.factor
            )));
        }
        let (tiles, chunks) = (self.kind.tiles(operand), self.kind.chunks(operand, self.length));
        let base = if self.kind.is_pair { (operand.base, operand.base_stride) } else { (0, 0) };
        let steps = [
            operand.aligned,
            base.0,
            operand.aligned_stride.wrapping_mul(size),
            base.1.wrapping_mul(size),
            columns * size,
        ];
        let stride = |stride: usize| {
            i64::try_from(stride)
                .map_err(|_| CudaError::Operands(format!("a stride of {stride} is larger than memory")))
        };
        let [whole, finished] = [self.owners[0].len(), self.owners[1].len()];
        self.modules.push(Module {
            aligned: operand.aligned,
            base: base.0,
            factor: operand.factor,
            aligned_stride: stride(operand.aligned_stride)?,
            base_stride: stride(base.1)?,
            result: stride(self.results)?,
            rows: int("rows", rows)?,
            columns: int("columns", columns)?,
            rank: int("columns of a factor", operand.rank)?,
            is_aligned: i32::from(steps.iter().all(|step| step.is_multiple_of(WIDE))),
            tiles: int("tiles", tiles)?,
            chunks: int("chunks", chunks)?,
            first: int("blocks", whole)?,
            first_finished: int("blocks", finished)?,
        });
        // The result may be the factor of another launch.
        self.results += (places * operand.rank).next_multiple_of(WIDE / size_of::<f32>());
        let groups = operand.rank.div_ceil(self.ranks);
        self.owners[0].extend(std::iter::repeat_n(index, tiles * chunks * groups));
        if chunks > 1 {
            self.owners[1].extend(std::iter::repeat_n(index, tiles * groups));
        }
        Ok(())
    }

    /// Appends the modules and the owners, up to a multiple of what a module is aligned to.
    fn write(&self, table: &mut Vec<u8>) {
        let words = |values: &[i32]| values.iter().flat_map(|value| value.to_ne_bytes()).collect::<Vec<u8>>();
        for module in &self.modules {
            for word in [module.aligned, module.base, module.factor] {
                table.extend_from_slice(&word.to_ne_bytes());
            }
            for long in [module.aligned_stride, module.base_stride, module.result] {
                table.extend_from_slice(&long.to_ne_bytes());
            }
            let Module { rows, columns, rank, is_aligned, tiles, chunks, first, first_finished, .. } = *module;
            table.extend(words(&[rows, columns, rank, is_aligned, tiles, chunks, first, first_finished]));
        }
        self.owners.iter().for_each(|owners| table.extend(words(owners)));
        table.resize(table.len().next_multiple_of(WIDE), 0);
    }

    /// Where the owners of blocks start in the table after this group's start, those of blocks that add chunks, and the next group.
    fn starts(&self) -> [usize; 3] {
        let owners = self.modules.len() * size_of::<Module>();
        let finished = owners + self.owners[0].len() * size_of::<i32>();
        [owners, finished, (finished + self.owners[1].len() * size_of::<i32>()).next_multiple_of(WIDE)]
    }

    fn partial(&self) -> usize {
        if self.owners[1].is_empty() { 0 } else { self.owners[0].len() * self.kind.tile() * self.ranks }
    }

    fn partial_squares(&self) -> usize {
        if self.kind.is_pair { self.owners[0].len() * WARPS } else { 0 }
    }
}

impl Kind {
    /// Rows or columns of V that a block takes of what is not contracted.
    const fn tile(self) -> usize {
        match self.form {
            Form::Transposed => WARPS * 8 * (WIDE / self.dtype.size()),
            Form::Straight => WARPS * 32,
        }
    }

    const fn tiles(self, operand: &Operand) -> usize {
        let (rows, columns) = operand.shape;
        match self.form {
            Form::Transposed => columns.div_ceil(self.tile()),
            Form::Straight => rows.div_ceil(self.tile()),
        }
    }

    /// At least one, so that zeros are written where there is nothing to add.
    const fn chunks(self, operand: &Operand, length: usize) -> usize {
        let (rows, columns) = operand.shape;
        let contracted = match self.form {
            Form::Transposed => rows,
            Form::Straight => columns,
        };
        if contracted <= length { 1 } else { contracted.div_ceil(length) }
    }

    fn kernel(self, ranks: usize) -> String {
        let form = match self.form {
            Form::Transposed => "transposed",
            Form::Straight => "straight",
        };
        let pair = if self.is_pair { "pair" } else { "single" };
        format!("{form}_{pair}_{}_{ranks}", self.dtype.name())
    }
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
    /// Puts the products of a plan on `stream`.
    ///
    /// # Safety
    /// Every address, those of the plan's operands among them, is that of as many elements on the device as its description says,
    /// which stay valid until the stream has come this far, and which nothing else writes meanwhile.
    ///
    /// # Errors
    /// When the kernels cannot be compiled, loaded or launched.
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
                // SAFETY: the parameters are Module*, int*, int, float*, float* and double*; the caller vouches for the addresses.
                unsafe { stream.launch(&library, &kind.kernel(ranks), grid, parameters)? };
                let grid = Grid { blocks: (group.owners[1].len(), 1), ..grid };
                let of_columns = i32::from(kind.form == Form::Transposed);
                let parameters = (table, finished, tile, int("columns", ranks)?, of_columns, results, partial);
                // SAFETY: the parameters are Module*, int*, int, int, int, float* and float*; the caller vouches for the addresses.
                unsafe { stream.launch(&library, "add_chunks", grid, parameters)? };
                if kind.is_pair {
                    let grid = Grid { blocks: (group.modules.len(), 1), threads: 32 };
                    // SAFETY: the parameters are Module*, double* and float*; the caller vouches for the addresses.
                    unsafe { stream.launch(&library, "add_squares", grid, (table, partial_squares, squares))? };
                }
                table = next;
                squares += group.modules.len() * size_of::<f32>();
            }
            Ok(())
        })
    }
}

/// Plans that were made, each with what the caller keeps beside it (its table on the device).
///
/// A plan is of one stream: on another one its table might be read before it is there, or be given up while it is read. Those used
/// last are kept, and for good those that a CUDA graph reads whenever it is replayed.
#[derive(Debug)]
pub struct Plans<Kept> {
    recent: VecDeque<(Request, Arc<Kept>)>,
    captured: Vec<Arc<Kept>>,
}

/// What a plan is found by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Number of the device and address of the stream.
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
    /// Plans that are kept.
    pub const MOST: usize = 16;

    /// The plan for a request, made where there is none.
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
            // Uploaded before the capture began, for which the device was waited for.
            let same = self.recent.iter().find(|(known, _)| known.modules == request.modules);
            let Some((_, found)) = same else {
                // Uploaded when the graph runs, and not before: of no use to anybody else.
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
        if is_captured {
            self.captured.push(Arc::clone(&kept));
        }
        self.recent.push_back((request, Arc::clone(&kept)));
        if self.recent.len() > Self::MOST {
            self.recent.pop_front();
        }
        Ok(kept)
    }

    /// Number of plans that are kept for now, and for good.
    #[must_use]
    pub fn counts(&self) -> [usize; 2] {
        [self.recent.len(), self.captured.len()]
    }
}
