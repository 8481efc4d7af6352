//! How products of many matrices V with thin factors X are divided into the blocks of launches.
//!
//! Blocks are equal except at edges, so none waits for a long one at the end, and a launch processes modules in order.
//! The division of a module depends only on shapes, and therefore so do the bits of its result.

use crate::argument::int;
use crate::{CudaError, Dtype};

/// Warps per block, as in the kernels' source.
pub(crate) const WARPS: usize = 4;
/// Bytes of one load.
const WIDE: usize = 16;
/// Lengths of the contraction per block, from longest to shortest; all are multiples of a step.
const LENGTHS: [usize; 6] = [4096, 2048, 1024, 512, 256, 128];
/// Number of blocks that keeps any GPU busy, if there is enough work.
const ENOUGH: usize = 2048;

/// Which product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Vᵀ·X, over the rows of V.
    Transposed,
    /// V·X, over its columns.
    Straight,
}

/// The properties that all matrices of a launch share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Which product.
    pub form: Form,
    /// Element type of all matrices.
    pub dtype: Dtype,
    /// Whether V is aligned − base, rather than one matrix.
    pub is_pair: bool,
}

/// One module's operands, as device addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// [rows, columns] with contiguous columns.
    pub aligned: usize,
    /// Same; unused if there is no pair.
    pub base: usize,
    /// Elements from one row to the next.
    pub aligned_stride: usize,
    /// Elements from one row to the next.
    pub base_stride: usize,
    /// Rows and columns of V.
    pub shape: (usize, usize),
    /// float32, contiguous, 16-byte aligned: [rows, rank] for the transposed form, else [columns, rank].
    pub factor: usize,
    /// Columns of X.
    pub rank: usize,
    /// Address of the result, float32, contiguous; 0: a place in the memory of all results.
    pub result: usize,
}

/// Same as `Module` in the kernels' source.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Module {
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

/// The division of one launch's work: modules of one kind.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) kind: Kind,
    pub(crate) ranks: usize,
    pub(crate) length: usize,
    pub(crate) modules: Vec<Module>,
    /// The module of each block, and of each block that adds chunks.
    pub(crate) owners: [Vec<i32>; 2],
    /// Elements of the results of this group and those before.
    results: usize,
}

/// Products of modules of any kinds, with one launch per kind.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) groups: Vec<Group>,
    /// For each module, in the given order: offset of its result, and index among the squares.
    places: Vec<(usize, usize)>,
}

impl Plan {
    /// Divides the work.
    ///
    /// # Errors
    /// If there is no operand, one is too large for a kernel, or some but not all results have an address.
    pub fn new(modules: &[(Kind, Operand)]) -> Result<Self, CudaError> {
        let mut kinds: Vec<Kind> = Vec::new();
        for (kind, _) in modules {
            if !kinds.contains(kind) {
                kinds.push(*kind);
            }
        }
        let mut plan = Self { groups: Vec::new(), places: vec![(0, 0); modules.len()] };
        let (mut results, mut square) = (0, 0);
        let lowest = modules.iter().map(|(_, operand)| operand.result).min().unwrap_or(0);
        for kind in kinds {
            let chosen: Vec<usize> = (0..modules.len()).filter(|index| modules[*index].0 == kind).collect();
            let operands: Vec<Operand> = chosen.iter().map(|index| modules[*index].1).collect();
            let group = Group::new(kind, &operands, results, lowest)?;
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

    /// The table to copy to the device.
    #[must_use]
    pub fn table(&self) -> Vec<u8> {
        let mut table = Vec::new();
        for group in &self.groups {
            group.write(&mut table);
        }
        table
    }

    /// For each module, in the given order: offset of its result [columns or rows of V, rank] from the memory of all
    /// results or from the result with the lowest address, and index among the squares.
    #[must_use]
    pub fn places(&self) -> &[(usize, usize)] {
        &self.places
    }

    /// Elements of all results.
    #[must_use]
    pub fn results(&self) -> usize {
        self.groups.last().map_or(0, |group| group.results)
    }

    /// Elements of the sums of chunks. Launches on one stream share them.
    #[must_use]
    pub fn partial(&self) -> usize {
        self.groups.iter().map(Group::partial).max().unwrap_or(0)
    }

    /// Elements of the partial squares.
    #[must_use]
    pub fn partial_squares(&self) -> usize {
        self.groups.iter().map(Group::partial_squares).max().unwrap_or(0)
    }
}

impl Group {
    fn new(kind: Kind, operands: &[Operand], results: usize, lowest: usize) -> Result<Self, CudaError> {
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
            group.add(int("modules", index)?, operand, lowest)?;
        }
        Ok(group)
    }

    fn add(&mut self, index: i32, operand: &Operand, lowest: usize) -> Result<(), CudaError> {
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
        if !operand.result.is_multiple_of(WIDE) || (operand.result == 0) != (lowest == 0) {
            return Err(CudaError::Operands(format!(
                "a result at {:#x}; all or none must have an address, a multiple of {WIDE} bytes",
                operand.result
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
            result: stride(if operand.result == 0 {
                self.results
            } else {
                (operand.result - lowest) / size_of::<f32>()
            })?,
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

    /// Appends the modules and the owners, padded to the alignment of a module.
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

    /// Offsets in the table from this group's start: owners of blocks, owners of blocks that add chunks, next group.
    pub(crate) fn starts(&self) -> [usize; 3] {
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
    /// Rows or columns of V per block, along the axis that is not contracted.
    pub(crate) const fn tile(self) -> usize {
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

    /// At least one, so that zeros are written if there is nothing to add.
    const fn chunks(self, operand: &Operand, length: usize) -> usize {
        let (rows, columns) = operand.shape;
        let contracted = match self.form {
            Form::Transposed => rows,
            Form::Straight => columns,
        };
        if contracted <= length { 1 } else { contracted.div_ceil(length) }
    }

    pub(crate) fn kernel(self, ranks: usize) -> String {
        let form = match self.form {
            Form::Transposed => "transposed",
            Form::Straight => "straight",
        };
        let pair = if self.is_pair { "pair" } else { "single" };
        format!("{form}_{pair}_{}_{ranks}", self.dtype.name())
    }
}
