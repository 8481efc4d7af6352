"""Triton kernels of products of many tall matrices with thin factors: M·X and Mᵀ·X, in float32.

M is a matrix, or the difference of two. ALIGNED and THIN_ALIGNED are element counts that divide the offsets, strides
and sizes of matrices and factors. One launch serves all modules from a work list. A table holds each module's operands
as distances in elements from those of the first module. It stays valid while the operands stay in place.
"""

import triton
import triton.language as tl

# Columns of the table, filled by triton.py.
MINUEND = tl.constexpr(0)
MINUEND_STRIDE = tl.constexpr(1)
SUBTRAHEND = tl.constexpr(2)
SUBTRAHEND_STRIDE = tl.constexpr(3)
ROWS = tl.constexpr(4)
COLUMNS = tl.constexpr(5)
FACTOR = tl.constexpr(6)
FACTOR_STRIDE = tl.constexpr(7)
RANK = tl.constexpr(8)
OUTPUT = tl.constexpr(9)
OUTPUT_STRIDE = tl.constexpr(10)
FIELDS = tl.constexpr(11)


@triton.jit
def _operand(first, entry, PLACE: tl.constexpr, STRIDE: tl.constexpr, MULTIPLE: tl.constexpr):
    """Pointer and stride of an operand, both marked as multiples. Call it before a loop, or the mark is lost."""
    offset = tl.multiple_of(tl.load(entry + PLACE), MULTIPLE)
    return first + offset, tl.multiple_of(tl.load(entry + STRIDE), MULTIPLE)


@triton.jit
def _block(operand, stride, row, column, inside, FLIPPED: tl.constexpr):
    """Load a block of an operand as float32, zero outside; FLIPPED means stored by columns."""
    row, column = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    place = column * stride + row if FLIPPED else row * stride + column
    return tl.load(operand + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def transposed_parts(
    matrices,
    subtrahends,
    factors,
    table,
    work,
    parts,
    squares,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    TURNED: tl.constexpr,
    PAIR: tl.constexpr,
    FLIPPED: tl.constexpr,
    THIN_FLIPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    THIN_ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Mᵀ·X of TILE columns over CHUNK rows, and the sum of squares of that block of M.

    A float32 operand that is transposed on its way to the tensor cores cannot be copied 16 bytes at a time. TURNED
    transposes the factor instead of M.

    Grid: work, [items, 4]: module, first column, first row, and the result's index in parts [items, TILE, WIDTH].
    """
    work += 4 * tl.program_id(0)
    entry = table + tl.load(work) * FIELDS
    first, begin, slot = tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    minuend, stride = _operand(matrices, entry, MINUEND, MINUEND_STRIDE, ALIGNED)
    subtrahend, other_stride = _operand(subtrahends, entry, SUBTRAHEND, SUBTRAHEND_STRIDE, ALIGNED)
    factor, factor_stride = _operand(factors, entry, FACTOR, FACTOR_STRIDE, THIN_ALIGNED)
    rows = tl.multiple_of(tl.load(entry + ROWS), ALIGNED if FLIPPED else 1)
    columns = tl.multiple_of(tl.load(entry + COLUMNS), 1 if FLIPPED else ALIGNED)
    rank = tl.multiple_of(tl.load(entry + RANK), 1 if THIN_FLIPPED else THIN_ALIGNED)
    column, thin = tl.multiple_of(first, 16) + tl.arange(0, TILE), tl.arange(0, WIDTH)
    if TURNED:
        product = tl.zeros([WIDTH, TILE], tl.float32)
    else:
        product = tl.zeros([TILE, WIDTH], tl.float32)
    square = tl.zeros([STEP, TILE], tl.float32)
    for start in range(0, CHUNK, STEP):
        row = tl.multiple_of(begin + start, 16) + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        values = _block(minuend, stride, row, column, inside, FLIPPED)
        if PAIR:
            values -= _block(subtrahend, other_stride, row, column, inside, FLIPPED)
            square += values * values
        inside = (row < rows)[:, None] & (thin < rank)[None, :]
        vectors = _block(factor, factor_stride, row, thin, inside, THIN_FLIPPED)
        if TURNED:
            product = tl.dot(tl.trans(vectors), values, product, input_precision=PRECISION)
        else:
            product = tl.dot(tl.trans(values), vectors, product, input_precision=PRECISION)
    places = slot.to(tl.int64) * TILE * WIDTH + (tl.arange(0, TILE) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    if TURNED:
        product = tl.trans(product)
    tl.store(parts + places, product)
    if PAIR:
        tl.store(squares + slot, tl.sum(square))


@triton.jit
def combine_parts(
    table, work, parts, squares, outputs, square_sums, TILE: tl.constexpr, WIDTH: tl.constexpr, PAIR: tl.constexpr
):
    """Add up the parts of TILE columns of a module, in the order of the rows.

    Grid: work, [tiles, 5]: module, first column, first part, number of parts, and the index in square_sums for the sum
    of squares (-1: none).
    """
    work += 5 * tl.program_id(0)
    entry = table + tl.load(work) * FIELDS
    first, part, count, place = tl.load(work + 1), tl.load(work + 2), tl.load(work + 3), tl.load(work + 4)
    row, column = tl.arange(0, TILE), tl.arange(0, WIDTH)
    total = tl.zeros([TILE, WIDTH], tl.float32)
    square = 0.0
    for number in range(count):
        places = (part + number).to(tl.int64) * TILE * WIDTH + (row * WIDTH)[:, None] + column[None, :]
        total += tl.load(parts + places)
        if PAIR:
            square += tl.load(squares + part + number)
    inside = (first + row < tl.load(entry + COLUMNS))[:, None] & (column < tl.load(entry + RANK))[None, :]
    places = (first + row).to(tl.int64)[:, None] * tl.load(entry + OUTPUT_STRIDE) + column[None, :]
    tl.store(outputs + tl.load(entry + OUTPUT) + places, total, mask=inside)
    if PAIR:
        tl.store(square_sums + place, square, mask=place >= 0)


@triton.jit
def products(
    matrices,
    subtrahends,
    factors,
    table,
    work,
    outputs,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIR: tl.constexpr,
    FLIPPED: tl.constexpr,
    THIN_FLIPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    THIN_ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """M·X of TILE rows. Grid: work, [items, 2]: module and first row."""
    work += 2 * tl.program_id(0)
    entry = table + tl.load(work) * FIELDS
    minuend, stride = _operand(matrices, entry, MINUEND, MINUEND_STRIDE, ALIGNED)
    subtrahend, other_stride = _operand(subtrahends, entry, SUBTRAHEND, SUBTRAHEND_STRIDE, ALIGNED)
    factor, factor_stride = _operand(factors, entry, FACTOR, FACTOR_STRIDE, THIN_ALIGNED)
    rows = tl.multiple_of(tl.load(entry + ROWS), ALIGNED if FLIPPED else 1)
    columns = tl.multiple_of(tl.load(entry + COLUMNS), 1 if FLIPPED else ALIGNED)
    rank = tl.multiple_of(tl.load(entry + RANK), 1 if THIN_FLIPPED else THIN_ALIGNED)
    row, thin = tl.multiple_of(tl.load(work + 1), 16) + tl.arange(0, TILE), tl.arange(0, WIDTH)
    product = tl.zeros([TILE, WIDTH], tl.float32)
    for start in range(0, columns, STEP):
        column = start + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        values = _block(minuend, stride, row, column, inside, FLIPPED)
        if PAIR:
            values -= _block(subtrahend, other_stride, row, column, inside, FLIPPED)
        inside = (column < columns)[:, None] & (thin < rank)[None, :]
        vectors = _block(factor, factor_stride, column, thin, inside, THIN_FLIPPED)
        product = tl.dot(values, vectors, product, input_precision=PRECISION)
    inside = (row < rows)[:, None] & (thin < rank)[None, :]
    places = row.to(tl.int64)[:, None] * tl.load(entry + OUTPUT_STRIDE) + thin[None, :]
    tl.store(outputs + tl.load(entry + OUTPUT) + places, product, mask=inside)
