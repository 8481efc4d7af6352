"""Hidden states of the reference model on disk: computed once per example, read in later epochs and other runs.

A row of a batch is found by its token ids, attention mask and positions, in the folder of its model, which is named after a
digest of weights, configuration, attention implementation, device and library versions. So another model, or other
tokens, find nothing. As a last check, the first row that another process stored is computed again and compared.

The states of a row depend on the rest of its batch by rounding alone, because attention does not cross rows. Packed
documents may see each other, so a packed row is stored whole and found again only as the same row.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from safelora_fast.data.batch_part import Part
from safelora_fast.errors import OutputError, SettingsError
from safelora_fast.files.digest import text_digest
from safelora_fast.files.store import write_json
from safelora_fast.files.tensor_records import RawTensor, TensorRecords
from safelora_fast.models.call_part import OF_HEAD, depends_on_longest_row
from safelora_fast.models.capture import Call, Capture, autocast_dtype
from safelora_fast.models.digests import UNIMPORTANT, base_weights_digest
from safelora_fast.models.distributed import sum_over_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from safelora_fast.models.anatomy import Anatomy
    from safelora_fast.models.reference_pass import ReferencePass

PREFIX = "cache:"
FORMAT = 1
DESCRIPTION = "model.json"  # for people
LAST = -1  # number of the last hidden state in a record; layers have their index
BY_TOKEN = {"input_ids", "attention_mask", "position_ids", "seq_idx", "token_type_ids"}  # [batch or 1, tokens]
WITHOUT_EFFECT = ("output_", "return_dict", "use_cache")  # beginnings of arguments' names
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
logger = logging.getLogger(__name__)


def split_reference(reference: str | nn.Module | None) -> tuple[str | nn.Module | None, Path | None]:
    """Split `reference=` into the reference model and the folder of its cache: "cache:FOLDER" is "base" with a cache.

    Raises:
        SettingsError: the folder is not named, or is a file.
    """
    if not isinstance(reference, str) or not reference.startswith(PREFIX):
        return reference, None
    folder = Path(reference.removeprefix(PREFIX)).expanduser()
    if not reference.removeprefix(PREFIX).strip():
        raise SettingsError('reference="cache:" names no folder: say "cache:FOLDER"')
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f'reference="{reference}": {folder} is not a folder: choose another name')
    return "base", folder


@dataclass(frozen=True)
class _Rows:
    """The rows of a part of a batch [batch, tokens], with their keys, and their lengths without padding behind them.

    They may be packed if they have positions and no mask.
    """

    batch: int
    tokens: int
    device: torch.device
    packed: bool
    keys: dict[int, bytes]
    lengths: dict[int, int]


States: TypeAlias = "dict[int, torch.Tensor]"  # of a row [length, hidden], by number, on the CPU


class CachedReference:
    """Runs the reference model on the rows of a batch that are not on disk yet, and stores their hidden states.

    The states have the dtype that the model computed. If they cannot be written (the disk is full), training goes on
    without storing more, and a warning says so: the loss does not depend on it. A batch with inputs that a key does not
    cover, such as images, runs as without a cache, also with a warning.

    Args:
        reference: runs the reference model, which has no active adapter.
        folder: has a folder for each model.
        sharded: whether FSDP2 shards the model. Then all processes run it as long as one of them needs it.
    """

    def __init__(self, reference: ReferencePass, folder: Path, *, sharded: bool) -> None:
        self._reference, self._folder, self._sharded = reference, folder, sharded
        self._numbers = [LAST, *reference.tap.indices]
        self._opened: TensorRecords | None = None
        self._writes, self._verified = True, False
        self._told: set[str] = set()

    def open(self) -> None:
        """Find the folder of the model's weights as they are now. Collective if the model is sharded.

        Raises:
            OutputError: the folder cannot be made.
        """
        if self._opened is None:
            identity = model_identity(self._reference.anatomy)
            folder = self._folder / text_digest(identity)[:32]
            self._opened = TensorRecords(folder)
            if not (folder / DESCRIPTION).exists():
                write_json(folder / DESCRIPTION, identity)

    def run(
        self, whole: Call | None, decoder: Call, *, part: Part | None, around: Callable[[], Any], stored: bool = True
    ) -> Capture:
        """Return the hidden states of the reference model: those on disk, and for the other rows those of a pass.

        Args:
            whole: the call of the whole model in training; None if only its decoder was called.
            decoder: the call of its decoder.
            part: the rows that are needed; None for all.
            around: creates the context to run in.
            stored: whether stored states may be used; otherwise the model runs.

        Raises:
            SettingsError: see :meth:`ReferencePass.run`; or stored states are not those of this model.
        """
        if stored and part is not None and part.columns is not None:
            part = part.by_rows()  # rows are stored whole
        rows = self._rows(whole, decoder, part) if stored else None
        found = {} if rows is None else {row: states for row in rows.keys if (states := self._read(rows.keys[row]))}
        check = None
        if rows is not None and not self._verified:
            check = next((row for row in found if not self._records.is_own(rows.keys[row])), None)
        run = [] if rows is None else [row for row in rows.keys if row not in found or row == check]
        if self._sharded:
            device = next(tensor.device for _, tensor in decoder.tensors())
            at_work = sum_over_ranks([float(rows is None or bool(run))], device)[0]
            if rows is not None and not run and at_work:
                run = [next(iter(rows.keys))]
        if rows is None:
            return self._reference.run(whole, decoder, part=part, around=around)
        if not run:
            return self._assembled(rows, found, part)
        all_run = len(run) == len(rows.keys)
        some = Part(rows.batch, rows.tokens, tuple(run), max(rows.lengths[row] for row in run))
        some = some.by_rows() if rows.packed else some
        capture = self._reference.run(whole, decoder, part=part if all_run else some, around=around)
        computed = self._by_row(capture, rows, run)
        if check is not None:
            self._compare(found[check], computed[check], capture.autocast)
        if rows.packed and len(found) < len(rows.keys):
            self._warn_once(
                "packed rows are stored whole and found again only as the same rows; where batches are flattened "
                "(padding_free) or packed anew, the folder grows with every epoch and saves no reference pass"
            )
        for row in run:
            if row not in found:
                self._write(rows.keys[row], computed[row])
        return capture if all_run else self._assembled(rows, {**found, **computed}, part)

    @property
    def _records(self) -> TensorRecords:
        assert self._opened is not None  # noqa: S101
        return self._opened

    def _rows(self, whole: Call | None, decoder: Call, part: Part | None) -> _Rows | None:
        """Return the rows of the part with their keys; None if there is an input that a key does not cover."""
        if not self._reference.runs_decoder(whole, decoder):
            self._tell("the decoder gets tensors that the model has computed from its inputs")
            return None
        anatomy = self._reference.anatomy
        given = {**dict(zip(inspect.signature(anatomy.decoder.forward).parameters, decoder.args)), **decoder.kwargs}  # noqa: B905
        used = {name: value for name, value in given.items() if value is not None and name not in OF_HEAD}
        used = {name: value for name, value in used.items() if not name.startswith(WITHOUT_EFFECT)}
        plain = {name: value for name, value in used.items() if isinstance(value, bool | int | float | str)}
        ids = used.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            self._tell("the decoder gets no input_ids [batch, tokens]")
            return None
        by_token = {}
        for name in sorted(used.keys() - plain.keys()):
            value = used[name]
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
            if name not in BY_TOKEN or shape not in {tuple(ids.shape), (1, ids.shape[1])}:
                self._tell(f"the decoder gets {name}, which a key does not cover")
                return None
            values = value != 0 if name == "attention_mask" else value
            by_token[name] = values.cpu().to(torch.int64).expand(ids.shape)
        if depends_on_longest_row(anatomy.config, decoder, ids.shape[1]):
            self._tell("rotary embeddings depend on the longest row of a batch")
            return None
        packed = "position_ids" in by_token and "attention_mask" not in by_token
        alone = packed and len(ids) == 1  # flash attention separates documents only in a batch of one row
        settings = json.dumps([str(autocast_dtype(ids.device.type)), alone, *sorted(plain.items())]).encode()
        keys, lengths = {}, {}
        for row in range(len(ids)) if part is None else part.rows:
            real = by_token["attention_mask"][row].nonzero() if "attention_mask" in by_token else None
            lengths[row] = ids.shape[1] if real is None or not len(real) else int(real[-1]) + 1
            digest = hashlib.blake2b(settings, digest_size=16)
            for name, values in by_token.items():
                digest.update(name.encode() + values[row, : lengths[row]].numpy().tobytes())
            keys[row] = digest.digest()
        return _Rows(ids.shape[0], ids.shape[1], ids.device, packed, keys, lengths)

    def _tell(self, reason: str) -> None:
        """Log once why batches run without the cache."""
        self._warn_once(f"not used for every batch, because {reason}")

    def _warn_once(self, words: str) -> None:
        if words not in self._told:
            self._told.add(words)
            logger.warning("%s: %s", self._folder, words)

    def _read(self, key: bytes) -> States | None:
        """Return the stored states of a row; None unless all are there."""
        raw = self._records.read(key, self._numbers)
        if len(raw) < len(self._numbers):
            self._records.refresh()
            raw = self._records.read(key, self._numbers)
        if len(raw) < len(self._numbers) or any(one.dtype not in DTYPES for one in raw.values()):
            return None
        return {
            number: torch.frombuffer(one.data, dtype=DTYPES[one.dtype]).view(one.shape) for number, one in raw.items()
        }

    def _write(self, key: bytes, states: States) -> None:
        there = self._records.read(key, self._numbers)  # for another defense, or for an equal row of this batch
        new = {number: _raw(values) for number, values in states.items() if number not in there}
        if not self._writes or not new:
            return
        try:
            self._records.append(key, new)
        except OutputError as error:
            self._writes = False
            logger.warning("%s; training goes on without storing more hidden states of the reference model", error)

    def _by_row(self, capture: Capture, rows: _Rows, run: list[int]) -> dict[int, States]:
        """Return the states of each row from a pass."""
        assert capture.hidden is not None  # noqa: S101
        places = {row: row for row in run} if capture.part is None else {r: n for n, r in enumerate(capture.part.rows)}
        values = {number: states.cpu() for number, states in {LAST: capture.hidden, **capture.layers}.items()}
        return {row: {n: states[places[row], : rows.lengths[row]] for n, states in values.items()} for row in run}

    def _assembled(self, rows: _Rows, states: dict[int, States], part: Part | None) -> Capture:
        """Put the states of the rows together as a pass on the part would return them; zeros behind the end of a row."""
        width = rows.tokens if part is None else part.width
        together = {}
        for number in self._numbers:
            values = [states[row][number] for row in rows.keys]
            padded = values[0].new_zeros(len(values), width, values[0].shape[1])
            for place, value in zip(padded, values, strict=True):
                place[: len(value)] = value
            together[number] = padded.to(rows.device)
        hidden = together.pop(LAST)
        return Capture(together, hidden, autocast_dtype(rows.device.type), part)

    def _compare(self, stored: States, computed: States, autocast: torch.dtype | None) -> None:
        """Compare the stored states of a row with computed ones.

        Raises:
            SettingsError: they differ by more than rounding.
        """
        for number, expected in computed.items():
            found = stored[number]
            alike = found.shape == expected.shape and found.dtype == expected.dtype
            apart = (found.double() - expected.double()).norm() / expected.double().norm() if alike else torch.inf
            rounding = max(torch.finfo(dtype).eps for dtype in (expected.dtype, autocast) if dtype is not None)
            if not apart <= rounding**0.5:
                raise SettingsError(
                    f"{self._records.folder}: the stored hidden states are not those of the reference model (relative "
                    f"distance {float(apart):.2g}), though its weights and configuration are the same: something else that "
                    "the model does has changed; name another folder, or delete this one"
                )
        self._verified = True


def model_identity(anatomy: Anatomy) -> dict[str, Any]:
    """Return what a model's hidden states depend on besides its inputs, as plain values. Adapters are left out."""
    import transformers

    config, decoder = anatomy.config, anatomy.decoder
    settings = {name: value for name, value in config.to_dict().items() if name not in UNIMPORTANT | {"use_cache"}}
    return {
        "format": FORMAT,
        "decoder": type(decoder).__qualname__,
        "weights": base_weights_digest(decoder),
        "configuration": json.loads(json.dumps(settings, sort_keys=True, default=str)),
        "attention": getattr(config, "_attn_implementation", None),
        "device": next(decoder.parameters()).device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _raw(states: torch.Tensor) -> RawTensor:
    rows, columns = states.shape
    values = states.contiguous().reshape(-1).view(torch.uint8).numpy()
    return RawTensor(str(states.dtype).removeprefix("torch."), (rows, columns), memoryview(values))
