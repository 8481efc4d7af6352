"""The writer of a projected adapter: a byte-for-byte copy of the input in which only projected tensors are replaced.

The order of keys, dtypes, metadata and all other tensors stay unchanged. Only keys that PEFT would not read are renamed
in the header.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from safelora_fast.checkpoints.adapter import WEIGHTS, Adapter
from safelora_fast.checkpoints.lora_config import CONFIG
from safelora_fast.errors import AdapterError
from safelora_fast.projection.settings import chosen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safelora_fast import _core
    from safelora_fast.checkpoints.experts import Slice
    from safelora_fast.projection.device.outcomes import DeviceFactorOutcome
    from safelora_fast.projection.jobs import AdapterFactors
    from safelora_fast.projection.report import ModuleReport
    from safelora_fast.projection.settings import Settings

    FactorOutcome: TypeAlias = _core.FactorOutcome | DeviceFactorOutcome

BITS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<u4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<u2")}


class AdapterWriter:
    """Writes one adapter to a new folder."""

    def __init__(self, adapter: Adapter, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.adapter = adapter
        self.folder = folder
        shutil.copyfile(adapter.path / CONFIG, folder / CONFIG)
        self._shift = _copy(adapter.file.path, folder / WEIGHTS, adapter.keys)

    def write(self, block: Slice, values: bytes) -> None:
        """Replace a block of a tensor by (rows, cols) row-major elements in the tensor's dtype."""
        view = self._view(self.folder / WEIGHTS, block, "r+", self._shift)
        view[...] = np.frombuffer(values, view.dtype).reshape(view.shape)

    def restore(self, block: Slice) -> None:
        """Restore the input's values in a block."""
        written = self._view(self.folder / WEIGHTS, block, "r+", self._shift)
        written[...] = self._view(self.adapter.file.path, block, "r")

    def _view(self, path: Path | str, block: Slice, mode: Literal["r", "r+"], shift: int = 0) -> np.ndarray[Any, Any]:
        dtype, _, begin, end = self.adapter.file.tensors[block.key]
        bits = BITS[dtype]
        elements = np.memmap(path, np.uint8, mode, begin + shift, end - begin).view(bits)
        strides = block.row_stride * bits.itemsize, block.col_stride * bits.itemsize
        start = elements[block.offset :]
        return np.lib.stride_tricks.as_strided(start, (block.rows, block.cols), strides, writeable=mode != "r")


class Output:
    """Collects the module reports of one adapter, and writes its projected factors.

    Args:
        adapter: the adapter's index in the plan.
        settings: the settings with the selection rule.
        writer: the writer, or None to write nothing.
    """

    def __init__(self, adapter: int, settings: Settings, writer: AdapterWriter | None) -> None:
        self.adapter, self.settings, self.writer = adapter, settings, writer
        self._modules: list[tuple[ModuleReport, list[Slice], AdapterError | None]] = []

    def add(self, report: ModuleReport, factors: AdapterFactors, outcome: FactorOutcome) -> None:
        """Add a module, and write its factors if the module may be selected.

        Raises:
            AdapterError: a projected factor exceeds the range of its dtype, and the module is certain to be selected.
        """
        failure, written = None, []
        if self.writer is not None and chosen({report.name: report.cosine}, self.settings):
            try:
                for block, values in (
                    (factors.lora_b, outcome.projected()),
                    (factors.lora_a, outcome.projected_lora_a()),
                ):
                    if values is not None:
                        self.writer.write(block, values)
                        written.append(block)
            except AdapterError as error:
                if self.settings.select != "number":
                    raise
                failure = error  # raised later if the module is selected
        self._modules.append((report, written, failure))

    def settled(self) -> list[ModuleReport]:
        """Select the modules, restore the others in the file, and return all reports."""
        selected = chosen({report.name: report.cosine for report, _, _ in self._modules}, self.settings)
        return [self._settled(*module, projected=module[0].name in selected) for module in self._modules]

    def _settled(
        self, report: ModuleReport, written: list[Slice], failure: AdapterError | None, *, projected: bool
    ) -> ModuleReport:
        reason = self.settings.why(report.cosine, projected=projected)
        if projected:
            if failure is not None:
                raise failure
            return replace(report, projected=True, reason=reason)
        if self.writer is not None:
            for block in written:
                self.writer.restore(block)
        if report.v_norm == 0:
            reason = "V is zero: aligned and base agree here"
        elif report.update_norm == 0:
            reason = "the update is zero"
        return replace(report, reason=reason, b_norm_after=report.b_norm, update_norm_after=report.update_norm)


def _copy(source: str, target: Path, keys: Mapping[str, str]) -> int:
    """Copy a safetensors file with renamed keys; return the shift of its data section in bytes."""
    if all(key == new for key, new in keys.items()):
        shutil.copyfile(source, target)
        return 0
    with Path(source).open("rb") as former, target.open("wb") as file:
        size = int.from_bytes(former.read(8), "little")
        header = json.loads(former.read(size))
        text = json.dumps({keys.get(key, key): entry for key, entry in header.items()}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(former, file)
    return len(text) - size
