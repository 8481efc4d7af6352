"""Shapes, orientation and row blocks of the weights that checkpoints/pairing.py found by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from safelora_fast import _core
from safelora_fast.checkpoints.adapter import FLOATS
from safelora_fast.checkpoints.orientation import experts_in_out, linear_in_out
from safelora_fast.checkpoints.pairing import INPUT_EMBEDDINGS, TensorNames
from safelora_fast.checkpoints.tensor_names import Piece, canonical
from safelora_fast.errors import CheckpointError, PairingError
from safelora_fast.files.json_reader import COUNT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from safelora_fast.checkpoints.adapter import LoraModule
    from safelora_fast.checkpoints.sources import TensorEntry

VOCABULARY = {*INPUT_EMBEDDINGS, "lm_head"}


@dataclass(frozen=True)
class Block:
    """Rows of a stored matrix: a view with unit column stride."""

    tensor: str
    file: _core.SafetensorsFile
    dtype: str
    begin: int
    offset: int
    rows: int
    cols: int

    @property
    def identity(self) -> tuple[str, str, int, int, int]:
        """A key that is equal for equal blocks."""
        return self.file.path, self.tensor, self.offset, self.rows, self.cols

    def cut(self, start: int, rows: int) -> Block:
        """Return `rows` rows of the block, starting at row `start`."""
        return replace(self, offset=self.offset + start * self.cols, rows=rows)

    def view(self) -> _core.View:
        """Return the block as a view for the extension."""
        return _core.View(
            self.file, self.tensor, offset=self.offset, rows=self.rows, cols=self.cols, row_stride=self.cols
        )


@dataclass(frozen=True)
class Matrix:
    """A weight as stored: blocks of rows. If `transposed`, they hold the transpose of (out, in)."""

    blocks: tuple[Block, ...]
    transposed: bool = False
    vocabulary: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        stored = sum(block.rows for block in self.blocks), self.blocks[0].cols
        return stored[::-1] if self.transposed else stored


@dataclass(frozen=True)
class ExpertWeights:
    """The parameters of a module with experts: for each, one tensor of all experts or the pieces of each expert."""

    module: str
    parameters: Mapping[str, str | tuple[tuple[Piece, ...], ...]]

    @staticmethod
    def locate(names: TensorNames, modules: Sequence[LoraModule]) -> ExpertWeights:
        """Find the parameters that lora_A and lora_B of these modules may belong to.

        Raises:
            PairingError: a parameter is missing.
        """
        module = modules[0].name
        wanted = modules[0].parameters or ("gate_up_proj", "down_proj")
        found = {parameter: names.parameter(module, parameter) for parameter in wanted}
        there = {parameter: weight for parameter, weight in found.items() if weight is not None}
        lacking = [parameter for parameter in wanted if parameter not in there]
        if lacking and (modules[0].parameters or len(there) < len(modules)):
            raise names.missing(module, f"{module}.{lacking[0]}")
        if len(there) < len(modules):
            raise PairingError(
                f"{module}: the adapter has {len(modules)} pairs of factors there, but target_parameters names "
                f"{', '.join(there)} only"
            )
        return ExpertWeights(module, there)

    def tensors(self) -> Iterator[str]:
        """Yield the names of all tensors."""
        for weight in self.parameters.values():
            if isinstance(weight, str):
                yield weight
            else:
                yield from (piece.tensor for pieces in weight for piece in pieces)

    def matrices(self, names: TensorNames, parameter: str) -> list[Matrix]:
        """Return one matrix for each expert.

        Raises:
            PairingError, CheckpointError: see :func:`matrix_of`.
        """
        weight = self.parameters[parameter]
        if not isinstance(weight, str):
            return [Matrix(_blocks(names, pieces, self.module), bool(pieces[0].transposed)) for pieces in weight]
        if self.flat(names, parameter):
            return [Matrix(_blocks(names, (Piece(weight),), self.module))]
        count, *shape = weight_entry(names, weight).shape
        if len(shape) != 2:
            raise PairingError(f"{self.module}: {weight} has shape {[count, *shape]}; experts need three axes")
        transposed = experts_in_out(names, weight, parameter, (shape[0], shape[1]))
        return [Matrix(_blocks(names, (Piece(weight, one),), self.module), transposed) for one in range(count)]

    def shapes(self, names: TensorNames) -> dict[str, tuple[int, int]]:
        """Return (out, in) of one expert, for each parameter."""
        return {parameter: self.matrices(names, parameter)[0].shape for parameter in self.parameters}

    def flat(self, names: TensorNames, parameter: str) -> bool:
        """Return whether the parameter is one matrix without an expert axis."""
        weight = self.parameters[parameter]
        return isinstance(weight, str) and len(weight_entry(names, weight).shape) == 2


def matrix_of(
    names: TensorNames,
    pieces: tuple[Piece, ...],
    module: str,
    shape: tuple[int, int] | None,
    *,
    embedding: bool = False,
    fan_in_fan_out: bool = False,
) -> Matrix:
    """Return the weight of a linear or embedding module.

    Args:
        names: the tensor names of the checkpoint.
        pieces: the result of `TensorNames.weight`.
        module: the name of the module.
        shape: (out, in) from the adapter. None without an adapter; config.json then tells where to cut a fused weight.
        embedding: whether the module is an embedding. PEFT stores its update as (hidden, vocabulary).
        fan_in_fan_out: `fan_in_fan_out` in the adapter's configuration.

    Raises:
        PairingError: a tensor is not a matrix, or cannot be cut as its name requires.
        CheckpointError: a tensor is quantized.
    """
    vocabulary = canonical(module) in VOCABULARY
    if embedding:
        return Matrix(_blocks(names, pieces, module), transposed=True, vocabulary=vocabulary)
    tensor, transposed = pieces[0].tensor, pieces[0].transposed
    if transposed is None:
        stored = weight_entry(names, tensor).shape
        transposed = len(pieces) == 1 and linear_in_out(
            names, tensor, stored, module, shape, fan_in_fan_out=fan_in_fan_out
        )
    rows = None if transposed else _part_rows(names, pieces[0], module) if shape is None else shape[0]
    return Matrix(_blocks(names, pieces, module, rows), transposed, vocabulary)


def cut_together(aligned: Matrix, base: Matrix) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """Cut both matrices into blocks with the same rows, even if the checkpoints fuse different modules."""
    edges = sorted({edge for matrix in (aligned, base) for edge in _edges(matrix.blocks)})
    return _cut(aligned.blocks, edges), _cut(base.blocks, edges)


def _edges(blocks: Sequence[Block]) -> Iterator[int]:
    edge = 0
    for block in blocks:
        edge += block.rows
        yield edge


def _cut(blocks: Sequence[Block], edges: Sequence[int]) -> tuple[Block, ...]:
    cuts, start = [], 0
    for block in blocks:
        end, done = start + block.rows, start
        for edge in edges:
            if start < edge <= end:
                cuts.append(block.cut(done - start, edge - done))
                done = edge
        start = end
    return tuple(cuts)


def _part_rows(names: TensorNames, piece: Piece, module: str) -> int | None:
    """Return the rows of one part of a fused weight, from config.json; None for a whole weight."""
    if piece.count == 1:
        return None
    height = weight_entry(names, piece.tensor).shape[-2]
    if piece.count == 2:
        return height // 2
    settings = (names.setting(name) for name in ("num_attention_heads", "head_dim", "hidden_size"))
    heads, size, hidden = (value if COUNT.fits(value) else 0 for value in settings)
    if not (heads and (size or hidden)):
        raise PairingError(
            f"{module}: config.json of the {names.role} model {names.checkpoint.description} does not tell how many "
            f"rows of {piece.tensor} are queries; name {piece.tensor.removesuffix('.weight').rpartition('.')[2]} instead"
        )
    queries: int = heads * (size or hidden // heads)
    return queries if piece.index == 0 else (height - queries) // 2


def weight_entry(names: TensorNames, tensor: str) -> TensorEntry:
    """Return the entry of a weight.

    Raises:
        CheckpointError: the weight is quantized.
    """
    entry = names.checkpoint.tensor(tensor)
    names.refuse_quantized(tensor)
    if entry.dtype not in FLOATS:
        where = f"{names.checkpoint.description}: {tensor} of the {names.role} model is {entry.dtype}"
        raise CheckpointError(f"{where}; weights must be F32, BF16 or F16, not quantized")
    return entry


def _blocks(names: TensorNames, pieces: Sequence[Piece], module: str, rows: int | None = None) -> tuple[Block, ...]:
    return tuple(_block(names, piece, module, rows) for piece in pieces)


def _block(names: TensorNames, piece: Piece, module: str, rows: int | None) -> Block:
    """Return the block of a piece. A fused weight is cut by `rows`, the height of the module's own weight."""
    entry = weight_entry(names, piece.tensor)
    model = f"the {names.role} model {names.checkpoint.description}"
    where = f"{module}: {piece.tensor} of {model} has shape {list(entry.shape)}"
    if len(entry.shape) != (2 if piece.expert is None else 3):
        raise PairingError(f"{where}; only linear layers, embeddings and experts can be projected")
    if 0 in entry.shape:
        raise PairingError(f"{where}; it is empty")
    height, width = entry.shape[-2:]
    offset = 0
    if piece.expert is not None:
        if piece.expert >= entry.shape[0]:
            raise PairingError(f"{where}, so it has no expert {piece.expert}")
        parameter = piece.tensor.rpartition(".")[2]
        if piece.count > 1 and experts_in_out(names, piece.tensor, parameter, (height, width)):
            raise PairingError(f"{where}: it is kept (experts, in, out), and cannot be cut by output rows")
        offset = piece.expert * math.prod(entry.shape[1:])
    block = Block(piece.tensor, entry.file, entry.dtype, entry.begin, offset, height, width)
    if piece.rows is not None:
        return block.cut(*piece.rows)
    if piece.count == 1 or rows is None:
        return block
    start = _start(piece, height, rows)
    if start is None:
        raise PairingError(
            f"{where}, which cannot hold the adapter's {rows} rows as part {piece.index + 1} of {piece.count}"
        )
    return block.cut(start, rows)


def _start(piece: Piece, height: int, rows: int) -> int | None:
    """Return the first row of a part in a fused matrix: two equal parts, or queries, keys and values."""
    if piece.count == 2:
        return piece.index * rows if height == 2 * rows else None
    rest = height - (rows if piece.index == 0 else 2 * rows)
    if rest <= 0 or (piece.index == 0 and rest % 2):
        return None
    return (0, rest, rest + rows)[piece.index]
