"""Runs the emulated CUDA kernels on tensors next to protected pages, and with masked tokens on protected pages.

It is a separate program because an invalid access kills the process: `python guarded_cuda.py end|start [overrun]`.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch
from emulated_cuda import emulated

from safelora_fast.ops import feature_distance
from safelora_fast.ops.base import served_by
from safelora_fast.ops.subspace_projection import matrix_products, transposed_products

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
REGIONS = []  # never freed


def guarded(shape, dtype, side):
    """Return a contiguous tensor that ends or starts at a protected page."""
    count = int(torch.Size(shape).numel())
    size = count * dtype.itemsize
    pages = -(-size // PAGE) * PAGE
    region = mmap.mmap(-1, pages + 2 * PAGE)
    REGIONS.append(region)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for guard in (address, address + PAGE + pages):
        assert LIBC.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0
    if not count:
        return torch.zeros(shape, dtype=dtype)
    # Kernels may rely on 16-byte alignment; torch's own allocations are aligned further.
    offset = PAGE if side == "start" else PAGE + pages - size
    if side == "end" and (address + offset) % dtype.itemsize:
        raise AssertionError(f"{size} bytes of {dtype} cannot end at a page")
    data = (ctypes.c_char * size).from_address(address + offset)
    return torch.frombuffer(data, dtype=dtype).view(shape)


def with_a_hole(tensor, token):
    """Return hidden states [1, tokens, hidden] with each token on a separate page; the page of `token` is protected."""
    _, tokens, hidden = tensor.shape
    region = mmap.mmap(-1, tokens * PAGE)
    REGIONS.append(region)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    data = (ctypes.c_char * (tokens * PAGE)).from_address(address)
    view = torch.frombuffer(data, dtype=tensor.dtype).view(1, tokens, -1)[..., :hidden]
    view.copy_(tensor)
    assert LIBC.mprotect(ctypes.c_void_p(address + token * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    return view


def filled(tensor, side):
    copy = guarded(tensor.shape, tensor.dtype, side)
    copy.copy_(tensor)
    return copy


def run(side):
    plain_empty = torch.empty

    def empty(*shape, dtype=torch.float32, device=None, **rest):  # noqa: ARG001
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return guarded(shape, dtype, side)

    torch.empty = empty
    try:
        for hidden in (1, 5, 8, 40, 1031):
            for dtype in (torch.float32, torch.bfloat16):
                features, reference = (filled(torch.randn(2, 3, hidden).to(dtype), side) for _ in range(2))
                mask = filled(torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(), side)
                torch.autograd.grad(feature_distance([features.requires_grad_()], [reference], mask), features)
        features, reference = (with_a_hole(torch.randn(1, 3, 40), 1) for _ in range(2))
        mask = torch.tensor([[True, False, True]])
        torch.autograd.grad(feature_distance([features.requires_grad_()], [reference], mask, "token"), features)
        for rows, columns, rank in ((1, 1, 1), (16, 64, 8), (33, 70, 5), (70, 33, 17), (200, 24, 32), (24, 200, 32)):
            for dtype in (torch.float32, torch.bfloat16):
                pair = tuple(filled(torch.randn(rows, columns).to(dtype), side) for _ in range(2))
                transposed_products([pair], [filled(torch.randn(rows, rank), side)])
                matrix_products([pair], [filled(torch.randn(columns, rank), side)])
    finally:
        torch.empty = plain_empty


if __name__ == "__main__":
    emulated(pytest.MonkeyPatch())
    if "overrun" in sys.argv:
        tensor = guarded((4,), torch.float32, sys.argv[1])
        ctypes.string_at(tensor.data_ptr() + (16 if sys.argv[1] == "end" else -1), 1)
    with served_by("cuda"):
        run(sys.argv[1])
    print("done")
