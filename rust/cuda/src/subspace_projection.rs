//! Products of many matrices V with thin factors X, all in one launch: Vᵀ·X or V·X, and ‖V‖² of pairs on the way.
//!
//! Which block computes what is settled once, in a [`Plan`]: a table that the caller copies to the device and keeps for as long as
//! its operands stay where they are. Blocks are alike but for those at edges, so none waits for a long one at the end, and the
//! order of a launch is that of the modules. How a module is cut depends on shapes alone, and so do the bits of its result.

use crate::argument::{at, int};
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
#[derive(Clone, Copy, Debug)]
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

/// How the work of a launch is cut.
#[derive(Clone, Debug)]
pub struct Plan {
    kind: Kind,
    ranks: usize,
    length: usize,
    modules: Vec<Module>,
    /// The module of each block, and of each block that adds chunks.
    owners: [Vec<i32>; 2],
    results: usize,
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
    /// float32 [modules]: ‖V‖²; written for pairs alone.
    pub squares: usize,
}

impl Plan {
    /// Cuts the work.
    ///
    /// # Errors
    /// When there is no operand, or one is larger than a kernel can count.
    pub fn new(kind: Kind, operands: &[Operand]) -> Result<Self, CudaError> {
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
        let mut plan = Self { kind, ranks, length, modules: Vec::new(), owners: [Vec::new(), Vec::new()], results: 0 };
        for (index, operand) in operands.iter().enumerate() {
            plan.add(int("modules", index)?, operand)?;
        }
        if plan.owners[0].is_empty() {
            return Err(CudaError::Operands("there is nothing to multiply".to_owned()));
        }
        Ok(plan)
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

    /// What the caller copies to the device.
    #[must_use]
    pub fn table(&self) -> Vec<u8> {
        let words = |values: &[i32]| values.iter().flat_map(|value| value.to_ne_bytes()).collect::<Vec<u8>>();
        let mut table = Vec::with_capacity(self.modules.len() * size_of::<Module>());
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
        table
    }

    /// First element of each module's result, [columns or rows of V, rank], among all.
    #[must_use]
    pub fn offsets(&self) -> Vec<usize> {
        self.modules.iter().map(|module| module.result as usize).collect()
    }

    /// Elements of all results.
    #[must_use]
    pub const fn results(&self) -> usize {
        self.results
    }

    /// Elements that sums of chunks take.
    #[must_use]
    pub fn partial(&self) -> usize {
        if self.owners[1].is_empty() { 0 } else { self.owners[0].len() * self.kind.tile() * self.ranks }
    }

    /// Elements that squares take.
    #[must_use]
    pub fn partial_squares(&self) -> usize {
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

    const fn kernel(self, ranks: usize) -> &'static str {
        macro_rules! names {
            ($form:literal, $kind:literal) => {
                match (self.dtype, ranks) {
                    (Dtype::F32, 16) => concat!($form, "_", $kind, "_f32_16"),
                    (Dtype::F32, _) => concat!($form, "_", $kind, "_f32_32"),
                    (Dtype::Bf16, 16) => concat!($form, "_", $kind, "_bf16_16"),
                    (Dtype::Bf16, _) => concat!($form, "_", $kind, "_bf16_32"),
                    (Dtype::F16, 16) => concat!($form, "_", $kind, "_f16_16"),
                    (Dtype::F16, _) => concat!($form, "_", $kind, "_f16_32"),
                }
            };
        }
        match (self.form, self.is_pair) {
            (Form::Transposed, false) => names!("transposed", "single"),
            (Form::Transposed, true) => names!("transposed", "pair"),
            (Form::Straight, false) => names!("straight", "single"),
            (Form::Straight, true) => names!("straight", "pair"),
        }
    }
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
        let mut memory = memory;
        let mut owners = memory.table + plan.modules.len() * size_of::<Module>();
        let mut finished = owners + plan.owners[0].len() * size_of::<i32>();
        let (mut length, mut tile, mut ranks) =
            (int("elements", plan.length)?, int("elements", plan.kind.tile())?, int("columns", plan.ranks)?);
        let mut of_columns = i32::from(plan.kind.form == Form::Transposed);
        device.on_stream(self.driver(), stream, |stream| {
            let grid = Grid { blocks: (plan.owners[0].len(), 1), threads: 32 * WARPS as u32 };
            let mut arguments = [
                at(&mut memory.table),
                at(&mut owners),
                at(&mut length),
                at(&mut memory.results),
                at(&mut memory.partial),
                at(&mut memory.partial_squares),
            ];
            // SAFETY: the parameters are Module*, int*, int, float*, float* and double*; the caller vouches for the addresses.
            unsafe { stream.launch(&library, plan.kind.kernel(plan.ranks), grid, &mut arguments)? };
            let mut arguments = [
                at(&mut memory.table),
                at(&mut finished),
                at(&mut tile),
                at(&mut ranks),
                at(&mut of_columns),
                at(&mut memory.results),
                at(&mut memory.partial),
            ];
            let grid = Grid { blocks: (plan.owners[1].len(), 1), ..grid };
            // SAFETY: the parameters are Module*, int*, int, int, int, float* and float*; the caller vouches for the addresses.
            unsafe { stream.launch(&library, "add_chunks", grid, &mut arguments)? };
            if plan.kind.is_pair {
                let mut arguments = [at(&mut memory.table), at(&mut memory.partial_squares), at(&mut memory.squares)];
                let grid = Grid { blocks: (plan.modules.len(), 1), threads: 32 };
                // SAFETY: the parameters are Module*, double* and float*; the caller vouches for the addresses.
                unsafe { stream.launch(&library, "add_squares", grid, &mut arguments)? };
            }
            Ok(())
        })
    }
}
