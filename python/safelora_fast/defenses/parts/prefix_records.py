"""The reference's keys and values of template tokens, recorded once for each prefix, and the distance to them."""

from __future__ import annotations

import logging
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from safelora_fast.data.template_tokens import documents
from safelora_fast.defenses.base import Attached
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import dissect
from safelora_fast.models.attention_states import AttentionState, find_attention_states
from safelora_fast.models.call_part import depends_on_longest_row
from safelora_fast.models.capture import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from safelora_fast.data.spans import Spans
    from safelora_fast.defenses.base import Observation
    from safelora_fast.models.anatomy import Anatomy
    from safelora_fast.models.capture import Capture, Pick

logger = logging.getLogger(__name__)


class PrefixRecords(Attached):
    """Compares keys and values of the template tokens with those that the reference gave for the same prefix.

    In a causal model they depend on the tokens up to there alone. A record is made in the first micro-batch with a new
    prefix, by the reference pass on that micro-batch; it is found again by the digest of the tokens up to its last
    template token. Records [tokens, features of all layers] are kept in host memory, in the dtype of the keys.

    Args:
        model: the model with its wrappers.
        mask: returns the template tokens of a micro-batch, bool [batch, tokens].
        layers: indices of layers; None for all that have keys and values.
        after_prompts: whether template tokens come after prompts, which may contain images or sounds.
        owner: the defense's name, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Callable[[Spans], torch.Tensor],
        *,
        layers: Sequence[int] | None,
        after_prompts: bool,
        owner: str,
    ) -> None:
        self._after_prompts = after_prompts
        self._model, self._mask, self._layers, self._owner = model, mask, layers, owner
        self._anatomy = dissect(model)
        self._states: list[AttentionState] = []
        self._absolute = self._warned = False
        self._records: dict[bytes, torch.Tensor] = {}
        self._prefixes: list[bytes] = []  # of the documents of this micro-batch that have template tokens
        self._lengths: list[int] = []  # number of template tokens of each
        self._places = torch.zeros(0, dtype=torch.long)  # of these tokens in the flattened micro-batch
        self._shape = (0, 0)  # of the micro-batch
        self._held: tuple[list[bytes], torch.Tensor] = [], torch.zeros(0)

    def start(self) -> None:
        """Find the modules that give keys and values, once."""
        if self._states:
            return
        found = find_attention_states(self._model, self._anatomy, self._layers, owner=self._owner)
        self._states, self._absolute = found

    def picks(self, anatomy: Anatomy, *, of_reference: bool) -> Mapping[str, Pick]:
        """Return the modules that give keys and values, and functions that take them out of their outputs.

        Those of the model in training are the template tokens', [template tokens, features]. Those of the reference are all,
        [batch, tokens, features]: on which part of the batch it ran is known only afterwards.
        """

        def pick(state: AttentionState, output: torch.Tensor) -> torch.Tensor:
            states = state.read(output)
            return states if of_reference else states.flatten(0, 1).index_select(0, self._places.to(output.device))

        return {
            _name(state): (
                anatomy.layers[state.layer].get_submodule(state.module),
                partial(pick, state),
            )
            for state in self._states
        }

    def before_pass(self, batch: Mapping[str, Any], spans: Spans) -> torch.Tensor:
        """Find the template tokens of a micro-batch; return those of prefixes without a record, bool [batch, tokens].

        Raises:
            SettingsError: no example of the first micro-batch has template tokens, or images or sounds come before them.
        """
        if self._after_prompts and (others := _beside_tokens(batch)):
            raise SettingsError(
                f"{self._owner}: keys after a prompt are found again by its tokens, but this batch has {', '.join(others)} too: "
                'set tokens="prefix"'
            )
        assert spans.ids is not None  # noqa: S101
        mask, ids = self._mask(spans).cpu().numpy(), spans.ids.cpu().numpy()
        unknown = np.zeros_like(mask)
        found = list(documents(spans.real, spans.segments))
        prefixes, lengths = [], []
        for row, start, end in found:
            chosen = start + np.flatnonzero(mask[row, start:end])
            if len(chosen):
                prefixes.append(self._digest(ids[row, start : chosen[-1] + 1], start, mask.shape[1]))
                lengths.append(len(chosen))
                unknown[row, chosen] = prefixes[-1] not in self._records
        self._warn_of_missing(len(found) - len(prefixes), len(found))
        self._prefixes, self._lengths = prefixes, lengths
        self._shape, self._places = mask.shape, torch.from_numpy(np.flatnonzero(mask)).to(spans.ids.device)
        return torch.from_numpy(unknown).to(spans.ids.device)

    def loss(self, observation: Observation) -> torch.Tensor:
        """Return the sum over documents of the mean over their template tokens, mean over layers of keys plus values.

        Raises:
            SettingsError: the keys and values were not seen, or have no gradient.
        """
        names = [_name(state) for state in self._states]
        if missing := [name for name in names if name not in observation.student.picked]:
            raise SettingsError(f"{self._owner}: the {missing[0]} were not seen: the layers must run uncompiled")
        if observation.reference is not observation.student:
            self._record(observation.reference, names)
        picked = [observation.student.picked[name] for name in names]
        if not self._prefixes:
            return torch.zeros((), device=picked[0].device)
        if torch.is_grad_enabled() and not any(states.requires_grad for states in picked):
            raise SettingsError(
                f"{self._owner}: the keys and values have no gradient: set use_reentrant=False where gradient checkpointing is "
                "on, and adapt the layers that are anchored or earlier ones"
            )
        widths = [states.shape[1] for states in picked]
        device = picked[0].device
        states = torch.cat([states.to(device) for states in picked], dim=1).float()  # [template tokens, features]
        reference = self._of_reference(device)
        apart, size = _sums((states - reference).square(), widths), _sums(reference.square(), widths)
        tokens = (apart / size.clamp(min=torch.finfo(torch.float32).tiny)).sum(dim=1)
        weights = torch.tensor([1 / length for length in self._lengths for _ in range(length)], device=device)
        return 2 * (tokens * weights).sum() / len(names)

    def _record(self, reference: Capture, names: Sequence[str]) -> None:
        """Keep the reference's keys and values of each new prefix, from the part of the micro-batch that it ran on."""
        rows, tokens = self._shape
        numbers = torch.arange(rows * tokens).view(rows, tokens)  # of all tokens
        numbers = numbers if reference.part is None else reference.part.take(numbers)
        in_part = {number: place for place, number in enumerate(numbers.flatten().tolist())}
        for prefix, places in zip(self._prefixes, self._places.cpu().split(self._lengths), strict=True):
            if prefix not in self._records and all(number in in_part for number in places.tolist()):
                chosen = torch.tensor([in_part[number] for number in places.tolist()])
                states = [reference.picked[name].flatten(0, 1) for name in names]
                self._records[prefix] = torch.cat([one[chosen.to(one.device)].cpu() for one in states], dim=1)

    def _of_reference(self, device: torch.device) -> torch.Tensor:
        """Return the records of the micro-batch's documents, float32 [template tokens, features]."""
        distinct = list(dict.fromkeys(self._prefixes))
        if self._held[0] != distinct or self._held[1].device != device:
            self._held = distinct, torch.cat([self._records[prefix] for prefix in distinct]).to(device).float()
        if len(distinct) == len(self._prefixes):
            return self._held[1]
        places = torch.arange(len(self._held[1])).split([len(self._records[prefix]) for prefix in distinct])
        of_prefix = dict(zip(distinct, places, strict=True))
        return self._held[1][torch.cat([of_prefix[prefix] for prefix in self._prefixes]).to(device)]

    def _digest(self, tokens: np.ndarray[Any, Any], start: int, width: int) -> bytes:
        """Digest of a prefix's tokens, and of where it stands where its keys depend on that."""
        by_width = depends_on_longest_row(self._anatomy.config, Call((), {}), width)
        place = np.array([start if self._absolute else 0, width if by_width else 0], "<i8")
        return blake2b(place.tobytes() + tokens.astype("<i8").tobytes(), digest_size=16).digest()

    def _warn_of_missing(self, missing: int, of: int) -> None:
        if missing == of and not self._records and of:
            raise SettingsError(
                f"{self._owner}: no example of the first micro-batch has the tokens that its chat template writes: give the "
                "tokenizer whose template wrote the examples"
            )
        if missing and not self._warned:
            self._warned = True
            logger.warning(
                "%s: %d of %d examples of a micro-batch lack the tokens of the chat template, and are not anchored",
                self._owner, missing, of,
            )  # fmt: skip


def _beside_tokens(batch: Mapping[str, Any]) -> list[str]:
    """Return the names of the inputs that are neither tokens nor masks: pixels, features of sounds."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return [name for name, value in tensors.items() if value.is_floating_point() and name != "attention_mask"]


def _name(state: AttentionState) -> str:
    return f"{state.kind} of layer {state.layer}"


def _sums(values: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """Return the sum over the features of each state, [tokens, states], of values [tokens, features]."""
    if len(set(widths)) == 1:
        return values.unflatten(1, (len(widths), widths[0])).sum(dim=2)
    return torch.stack([part.sum(dim=1) for part in values.split(widths, dim=1)], dim=1)
