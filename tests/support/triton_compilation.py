"""Compiles the Triton kernels for a GPU that is not installed: `triton_compilation.py ARCHITECTURE [PART_OF_NAME]`.

Prints one line of JSON per kernel: registers, spills, and the loads in its loops. test_triton_compiled.py runs it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from safelora_fast.ops.feature_distance import triton as distance_backend
from safelora_fast.ops.feature_distance import triton_kernels as distance
from safelora_fast.ops.linear_kl import triton as loss_backend
from safelora_fast.ops.linear_kl import triton_kernels as loss
from safelora_fast.ops.subspace_projection import triton as product_backend
from safelora_fast.ops.subspace_projection import triton_kernels as product

ALIGNED = [["tt.divisibility", 16]]
LAYERS = 5


def variants():
    """Yield (name, kernel, types by argument, constants, options). Plain integer types mean values divisible by 16."""
    rows = {"rows": "i32", "tokens": "i32"}
    strides, mask = ("i64", "i32", 1), {"mask_row": "i32", "mask_token": "i32"}
    for dtype in ("bf16", "fp32"):
        blocks = (f"*{dtype}",) * LAYERS
        states = {"features": blocks, "references": blocks}
        read = {"hidden": "i32", "feature_strides": strides, "reference_strides": strides}
        tile = {"TOKENS": distance_backend.TOKENS, "COLUMNS": distance_backend.COLUMNS}
        yield f"token_sums {dtype}", distance.token_sums, {
            **states, "mask": "*i1", "sums": "*fp32", **rows, **read, **mask
        }, tile, {}  # fmt: skip
        yield f"gradients {dtype}", distance.gradients, {
            **states, "factors": "*fp32", "weight": "*fp32", "outputs": blocks, **rows, **read
        }, tile, {}  # fmt: skip
    for packed in (False, True):
        yield f"sequence_factors packed={packed}", distance.sequence_factors, {
            "sums": "*fp32", "mask": "*i1", "first": "*i32", "last": "*i32", "distances": "*fp64", "factors": "*fp32",
            **rows, **mask,
        }, {"PACKED": packed, "EXACT": triton.language.float64, "TILE": distance_backend.TOKEN_TILE}, {}  # fmt: skip
    yield "token_factors", distance.token_factors, {
        "sums": "*fp32", "mask": "*i1", "distances": "*fp64", "factors": "*fp32", **rows, **mask
    }, {"UNIT": True, "EXACT": triton.language.float64, "TILE": distance_backend.TOKEN_TILE}, {}  # fmt: skip
    yield "sequence_bounds", distance.sequence_bounds, {
        "mask": "*i1", "segments": "*i64", "first": "*i32", "last": "*i32", "tokens": "i32",
        **mask, "segment_row": "i32", "segment_token": "i32",
    }, {"TILE": distance_backend.BOUNDS_TILE}, {}  # fmt: skip
    yield from losses()
    yield from products()


def losses():
    for dtype, forward, labeled, tempered in (
        ("bf16", False, True, False), ("bf16", True, False, False), ("fp32", False, True, True),
    ):  # fmt: skip
        yield f"linear_loss {dtype} {forward=} {labeled=} {tempered=}", loss.linear_loss, {
            "raw": f"*{dtype}", "delta": f"*{dtype}", "bias": f"*{dtype}", "divergence_factor": "*fp32",
            "labels": "*i64", "label_factor": "*fp32", "figures": "*fp32", "rows": "i32", "vocabulary": "i32",
            "raw_stride": "i32", "delta_stride": "i32", "scale": "fp32", "softcap": "fp32", "temperature": "fp32",
        }, {
            "HAS_BIAS": False, "CAPPED": False, "TEMPERED": tempered, "FORWARD": forward, "LABELED": labeled,
            "TILE": loss_backend.TILE,
        }, {"num_warps": loss_backend.WARPS}  # fmt: skip


def products():
    tables = {"table": "*i64", "work": "*i32"}
    for dtype, is_pair, tile, width in (("bf16", True, 64, 16), ("bf16", True, 64, 64), ("fp32", False, 64, 32)):
        operands = {"matrices": f"*{dtype}", "subtrahends": f"*{dtype}", "factors": "*fp32", **tables}
        common = {
            "STEP": product_backend.STEP, "WIDTH": width, "PAIR": is_pair, "FLIPPED": False, "THIN_FLIPPED": False,
            "ALIGNED": 16, "THIN_ALIGNED": 8, "PRECISION": "tf32x3",
        }  # fmt: skip
        yield f"transposed_parts {dtype} {width}", product.transposed_parts, {
            **operands, "parts": "*fp32", "squares": "*fp32"
        }, {**common, "CHUNK": product_backend.CHUNK, "TILE": tile, "TURNED": dtype == "fp32"}, {}  # fmt: skip
        yield f"products {dtype} {width}", product.products, {**operands, "outputs": "*fp32"}, {
            **common, "TILE": product_backend.ROW_TILE
        }, {}  # fmt: skip
        yield f"combine_parts {dtype} {width}", product.combine_parts, {
            **tables, "parts": "*fp32", "squares": "*fp32", "outputs": "*fp32", "square_sums": "*fp32"
        }, {"TILE": tile, "WIDTH": width, "PAIR": is_pair}, {}  # fmt: skip


def source(kernel, signature, constants):
    """Return the kernel source as a launch specializes it: pointers and integers divisible by 16, strides of 1 constant."""
    types, fixed, attributes = {}, dict(constants), {}
    for place, name in enumerate(kernel.arg_names):
        kind = signature.get(name, "constexpr")
        if isinstance(kind, tuple):
            types[name] = tuple("constexpr" if part == 1 else part for part in kind)
            for index, part in enumerate(kind):
                if part == 1:
                    fixed[place, index] = 1
                else:
                    attributes[place, index] = ALIGNED
            continue
        types[name] = kind
        if kind.startswith(("*", "i")) and not kernel.params[place].do_not_specialize:
            attributes[place,] = ALIGNED
    return ASTSource(kernel, types, fixed, attributes)


def resources(ptx, architecture):
    """Return registers and spilled bytes, as reported by ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        target = re.search(r"\.target (\w+)", ptx).group(1)
        run = subprocess.run(
            [get_ptxas(architecture).path, "-v", f"--gpu-name={target}", str(path), "-o", f"{folder}/out"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill", run.stderr))
    return int(re.search(r"Used (\d+) registers", run.stderr).group(1)), spills


def main(architecture, only=""):
    for name, kernel, signature, constants, options in variants():
        if only not in name:
            continue
        built = triton.compile(
            source(kernel, signature, constants),
            target=GPUTarget("cuda", architecture, 32),
            options={**options, "enable_fp_fusion": True},
        )
        registers, spills = resources(built.asm["ptx"], architecture)
        wide = re.findall(r"(?:ld\.global|cp\.async\S*global)\S*", built.asm["ptx"])
        print(json.dumps({
            "kernel": name, "registers": registers, "spills": spills,
            "shared": built.metadata.shared, "cubin": len(built.asm["cubin"]),
            "loads": sorted(set(wide)), "copies_16": len(re.findall(r"cp\.async.*0x10", built.asm["ptx"])),
            "mma": len(re.findall(r"mma\.sync|wgmma|tcgen05\.mma", built.asm["ptx"])),
        }))  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
