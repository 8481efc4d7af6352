"""Names that a checkpoint's tensors get while transformers loads them, from transformers' own conversion table.

The table is used only for names that do not pair without it, because importing it imports torch. For names in numbered
layers, it is used only if it has an entry for the model. It also lists tied weights. Without transformers 5 there are
no conversions.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.tensor_names import NameIndex, Piece
from safelora_fast.errors import PairingError
from safelora_fast.printable import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.checkpoints.sources import Checkpoint

TABLE = "conversion_mapping.py"
COUNTS = re.compile("layers|num_.*experts|num_.*heads|num_.*blocks|depth")
SIZES = re.compile("size|dim|length|position")
MOST_MODULES = 4096
MOST_SIZE = 10**8


@dataclass(frozen=True)
class Converted:
    """Where a tensor of the loaded model is stored on disk.

    Attributes:
        matrices: the pieces of the matrix, or of each expert's matrix in order.
        of_experts: whether each item of `matrices` belongs to one expert.
        reason: why the tensor cannot be read from disk; `matrices` is then empty.
    """

    matrices: tuple[tuple[Piece, ...], ...]
    of_experts: bool = False
    reason: str = ""


class LoadedNames:
    """The conversions of one checkpoint, computed on first use."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def find(self, name: str, tower: str | None) -> Converted | None:
        """Return where a tensor of the loaded model is stored on disk; None if unknown.

        Raises:
            PairingError: the tensor cannot be read from disk, several tensors match, or the table fails.
        """
        if not self._named and any(part.isdigit() for part in name.split(".")):
            return None  # a tensor outside the numbered layers may still be tied to another
        found = self._index.find(name, tower)
        if not found:
            return None
        if len(found) > 1:
            raise PairingError(
                f"{name}: the loaded model has several tensors that may be meant: {', '.join(sorted(found)[:4])}"
            )
        converted = self._table[found[0]]
        if converted.reason:
            raise PairingError(f"{name}: {converted.reason}")
        return converted

    @cached_property
    def _named(self) -> bool:
        return in_the_table(self._checkpoint.config or {})

    @cached_property
    def _table(self) -> Mapping[str, Converted]:
        try:
            return conversions(self._checkpoint)
        except Exception as error:  # the table is not a public interface of transformers: any call may fail
            from transformers import __version__

            raise PairingError(
                f"{self._checkpoint.description}: the names that transformers {__version__} gives this model's tensors cannot be "
                f"found out ({type(error).__name__}: {one_line(str(error))}): use another version of transformers"
            ) from error

    @cached_property
    def _index(self) -> NameIndex:
        return NameIndex(self._table)


def conversions(checkpoint: Checkpoint) -> dict[str, Converted]:
    """Return where tensors of the loaded model are stored on disk; empty if transformers has no conversions.

    The class named in config.json is instantiated without weights. If that fails, only the table's entry for the model
    type is used.
    """
    model_type = (checkpoint.config or {}).get("model_type")
    if not isinstance(model_type, str):
        return {}
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:
        return {}
    model = _without_weights(checkpoint)
    transforms = get_checkpoint_conversion_mapping(model_type) if model is None else get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms or [] if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms or [] if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = (None, None) if model is None else (model.state_dict(), model.base_model_prefix)
    found: dict[str, Converted] = {}
    gathered: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(checkpoint.names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if state is not None and key not in state and name in state:
            key, pattern = name, None
        if pattern is None:
            found[key] = Converted(((Piece(name),),))
        else:
            gathered[key][pattern].append(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in (state or {}).items()}
    for key, sources in gathered.items():
        found.update(_converted(key, sources, by_pattern[next(iter(sources))], shapes))
    for key, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if key not in found and other in found:
            found[key] = found[other]
    return found


def in_the_table(config: Mapping[str, Any]) -> bool:
    """Return whether the installed table names this type of model or one of its parts.

    The source of the table is searched; it is not imported.
    """
    specification = importlib.util.find_spec("transformers")
    places = (specification and specification.submodule_search_locations) or []
    table = next((path for place in places if (path := Path(place, TABLE)).exists()), None)
    if table is None:
        return False
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    names = {part.get("model_type") for part in parts} | set(config.get("architectures") or [])
    text = table.read_text(encoding="utf-8")
    return any(f'"{name}"' in text for name in names if name)


def _boundless(checkpoint: Checkpoint) -> bool:
    """Return whether config.json has far more modules than there are tensors; building the model would take forever."""
    config = checkpoint.config or {}
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    most = {COUNTS: max(MOST_MODULES, len(list(checkpoint.names))), SIZES: MOST_SIZE}
    sizes = [(key, size) for part in parts for key, size in part.items() if isinstance(size, int)]
    return any(size > limit and kind.search(key) for key, size in sizes for kind, limit in most.items())


def _without_weights(checkpoint: Checkpoint) -> Any:
    """Return the model of a checkpoint on the meta device; None if it cannot be built."""
    import torch
    import transformers

    config: Any = checkpoint.config
    if _boundless(checkpoint):
        return None
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
            return getattr(transformers, config["architectures"][0])(settings)
    except Exception:  # the configuration does not fit the installed transformers
        return None
    finally:
        transformers.logging.set_verbosity(verbosity)


def _converted(
    key: str, sources: Mapping[str, Sequence[str]], converter: Any, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Converted]:
    """Return the rows on disk that an operation of the table combines, or the reason why they cannot be read."""
    operations = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
    names = [list(sources.get(pattern, [])) for pattern in converter.source_patterns]
    first, *others = converter.target_patterns
    targets = [key, *(key.replace(first, other, 1) for other in others)]
    several = len(shapes[key]) == 3 if key in shapes else operations[0][0] == "MergeModulelist"
    match operations:
        case [("MergeModulelist", 0)] | [("MergeModulelist", 0), ("Concatenate", 1)] if several:
            if len({len(each) for each in names}) == 1:
                experts = tuple(tuple(Piece(name) for name in each) for each in zip(*names, strict=True))
                return {key: Converted(experts, of_experts=True)}
        case [("Concatenate", 0)] if not several and all(len(each) == 1 for each in names):
            return {key: Converted((tuple(Piece(each[0]) for each in names),))}
        case [("Concatenate", 1)] if several and key in shapes and all(len(each) == 1 for each in names):
            experts = tuple(tuple(Piece(each[0], expert) for each in names) for expert in range(shapes[key][0]))
            return {key: Converted(experts, of_experts=True)}
        case [("Chunk" | "Split", dim)] if all(target in shapes for target in targets) and dim == len(shapes[key]) - 2:
            return _cut(names[0][0], targets, shapes)
        case [("Transpose", None)] if key in shapes and not converter.operations[0].check_dims:
            counts = range(shapes[key][0]) if several else [None]
            matrices = tuple((Piece(names[0][0], expert, transposed=True),) for expert in counts)
            return {key: Converted(matrices, of_experts=several)}
        case _:
            pass
    rearranged = ", ".join(name for name, _ in operations)
    reason = f"transformers rearranges {sources[next(iter(sources))][0]} while loading it ({rearranged}), which is not done here"
    return {target: Converted((), reason=reason) for target in targets}


def _cut(name: str, targets: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Converted]:
    found, start = {}, 0
    for target in targets:
        *experts, rows, _ = shapes[target]
        counts = range(experts[0]) if experts else [None]
        parts = tuple((Piece(name, expert, rows=(start, rows)),) for expert in counts)
        found[target] = Converted(parts, of_experts=bool(experts))
        start += rows
    return found
