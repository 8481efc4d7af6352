"""Records the forward passes of a model in training, and runs the reference model on the same inputs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.data.batch_part import Part, part_of
from safelora_fast.data.draws import draws
from safelora_fast.data.spans import Spans, read_spans
from safelora_fast.defenses.base import BatchDefense, Defense, Observation
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import entrances
from safelora_fast.models.capture import Call, Capture, StudentRecorder, Tap
from safelora_fast.models.distributed import sum_over_ranks
from safelora_fast.models.lora_factors import check_no_prompt_learning
from safelora_fast.models.reference_cache import CachedReference, split_reference
from safelora_fast.models.reference_pass import Reference, ReferencePass, check_inputs
from safelora_fast.models.shards import is_sharded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from safelora_fast.data.template_tokens import TemplateTokens
    from safelora_fast.defenses.base import Attached, Run
    from safelora_fast.models.anatomy import Anatomy
    from safelora_fast.models.capture import Pick
    from safelora_fast.training.metrics import Stopwatch


@dataclass(frozen=True)
class Recorded:
    """The recorded pass of one micro-batch.

    Attributes:
        anatomy: parts of the model.
        student: hidden states of the model in training.
        reference: hidden states of the reference model for the part of the batch that it ran on; None if it did not run.
        spans: tokens of the micro-batch.
    """

    anatomy: Anatomy
    student: Capture
    reference: Capture | None
    spans: Spans

    def examples(self, defense: BatchDefense) -> Observation | None:
        """Return the examples that a defense looks at, with others; None if there is none in this micro-batch.

        If it needs no reference model, that is the whole batch, with the model's own states as the reference's. It is also
        the whole batch if it keeps what the reference gave.
        """
        if not defense.needs_reference or defense.keeps_reference:
            observation = Observation(self.anatomy, self.student, self.reference or self.student, self.spans)
        elif self._part is None:
            return None
        else:
            observation = self._part
        return replace(observation, spans=observation.spans.drawn(defense.sample))

    def whole(self, defense: BatchDefense) -> Observation:
        """Return the whole micro-batch. Hidden states of the reference model are zero where it did not run."""
        reference, spans = self.reference, self.spans.drawn(defense.sample)
        if reference is None or reference.hidden is None:
            assert self.student.hidden is not None  # noqa: S101
            reference = Capture({}, torch.zeros_like(self.student.hidden), self.student.autocast)
        elif reference.part is not None:
            reference = Capture({}, reference.part.spread(reference.hidden), reference.autocast)
        return Observation(self.anatomy, self.student, reference, spans)

    @cached_property
    def _part(self) -> Observation | None:
        """The part of the batch that the reference model ran on."""
        reference, student, spans = self.reference, self.student, self.spans
        if reference is not None and (part := reference.part) is not None:
            student, spans = student.of_part(part, reference.layers), spans.of_part(part)
        return None if reference is None else Observation(self.anatomy, student, reference, spans)


class TrainingPasses:
    """Records the pass inside `recording()`. Hooks of defenses act inside it, and also while the model is in training mode.

    Args:
        model: the model with its wrappers.
        anatomy: parts of the model.
        reference: the reference model; None if no defense needs one.
        defenses: the defenses whose loss depends on the batch.
        layers: indices of the layers to record, in both the model and the reference model.
        template: finds the tokens of the chat template; None if no defense asks for them.
        watched: indices of the layers to record in the model alone.
        records: whether anything is recorded.
        run: the training run; its seed and step decide which examples are drawn.
        stopwatch: counts the time of reference passes.

    Attributes:
        reference: runs the reference model; None if no defense needs one.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        reference: Reference | None,
        *,
        defenses: Sequence[BatchDefense],
        layers: Sequence[int],
        watched: Sequence[int],
        records: bool,
        run: Run,
        stopwatch: Stopwatch,
        template: TemplateTokens | None = None,
    ) -> None:
        self._anatomy, self._defenses, self._run, self._stopwatch = anatomy, defenses, run, stopwatch
        self._template = template
        self._states: dict[str, Attached] = {}
        self._running = 0
        self._spans: Spans | None = None
        self._part: Part | None = None  # of the batch, that the reference runs on
        self._recorder: StudentRecorder | None = None
        self.reference: ReferencePass | None = None
        self._cache: CachedReference | None = None
        self._recorded_anew = False  # whether a defense that keeps what the reference gave needs a pass
        reference, folder = split_reference(reference)
        self._sharded = is_sharded(anatomy.model) or (isinstance(reference, torch.nn.Module) and is_sharded(reference))
        if not records:
            return
        check_no_prompt_learning(model)
        if reference is not None:
            self.reference = ReferencePass(model, anatomy, reference, list(layers))
            if folder is not None:
                self._cache = CachedReference(self.reference, folder, sharded=self._sharded)
        run_reference = None if reference is None else self._run_reference
        self._recorder = StudentRecorder(Tap(anatomy, [*layers, *watched]), run_reference, entrances(model))

    def check_hooks(self, defenses: Sequence[Defense]) -> None:
        """Raise SettingsError for a defense whose hooks act on a reference model whose hidden states are stored."""
        for defense in defenses:
            if self._cache is not None and type(defense).install is not Defense.install:
                raise SettingsError(
                    f"{type(defense).__name__} acts on the reference model too, so what that computes cannot be stored: say "
                    'reference="base"'
                )

    def install(self, defenses: Sequence[tuple[Defense, Attached | None]]) -> list[Any]:
        """Install the defenses' hooks on the model and on a separate reference model, and then the recording hooks.

        Args:
            defenses: each defense with its state for this model.

        Returns:
            The handles that remove the defenses' hooks.
        """
        model = self._anatomy.model
        handles: list[Any] = []
        self._states = {defense.name: attached for defense, attached in defenses if attached is not None}
        for defense, _ in defenses:
            handles.extend(defense.install(self._anatomy, lambda: model.training or self._running > 0))
            if self.reference is not None and self.reference.anatomy.model is not model:
                handles.extend(defense.install(self.reference.anatomy, lambda: self._running > 0))
        if self._recorder is not None:
            self._recorder.attach(self._picks(self._anatomy, of_reference=False))
        if self.reference is not None:
            self.reference.tap.attach(self._picks(self.reference.anatomy, of_reference=True))
        return handles

    def _picks(self, anatomy: Anatomy, *, of_reference: bool) -> dict[str, Pick]:
        states = self._states.values()
        return {name: pick for one in states for name, pick in one.picks(anatomy, of_reference=of_reference).items()}

    def remove(self) -> None:
        """Remove the recording hooks."""
        if self._recorder is not None:
            self._recorder.detach()
        if self.reference is not None:
            self.reference.tap.detach()

    @contextmanager
    def recording(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Record the training pass on `batch` that runs inside this context.

        Raises:
            SettingsError: no pass runs, or an input depends on trained parameters.
        """
        with self._engaged():
            if self._recorder is None:
                yield
                return
            self._spans = self._read(batch)
            if self.reference is not None:
                check_inputs(Call((), batch))
                self._part = self._looked_at(batch, self._spans)
            if self._cache is not None:
                self._cache.open()
            with self._recorder.recording():
                yield

    @contextmanager
    def observed(self) -> Iterator[Recorded | None]:
        """Yield the recorded pass; None if nothing is recorded. It is released afterwards, to free memory for backward.

        Raises:
            SettingsError: no pass was recorded, or the shape of its hidden states does not match the batch's tokens.
        """
        if self._recorder is None:
            yield None
            return
        try:
            student, spans = self._recorder.student, self._spans
            if student is None or spans is None:
                raise SettingsError("regularizer() needs a pass recorded by recording() before it")
            hidden = student.hidden
            if hidden is None or hidden.shape[:2] != spans.real.shape:
                shape = None if hidden is None else tuple(hidden.shape)
                raise SettingsError(
                    f"the batch has tokens {tuple(spans.real.shape)}, the decoder gave hidden states {shape}"
                )
            yield Recorded(self._anatomy, student, self._recorder.reference, spans)
        finally:
            self._recorder.forget()
            self._spans = None

    @contextmanager
    def _engaged(self) -> Iterator[None]:
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def _read(self, batch: Mapping[str, Any]) -> Spans:
        """Read the tokens of a batch, and draw examples if a defense samples."""
        spans = read_spans(batch, self._template)
        if all(defense.sample == 1 for defense in self._defenses):
            return spans
        return replace(spans, draws=draws(batch, spans, seed=self._run.seed, step=self._run.steps))

    def _looked_at(self, batch: Mapping[str, Any], spans: Spans) -> Part | None:
        """Return the part of the batch that defenses compare with the reference; None for the whole batch.

        If the models are sharded, all processes must run the same layers: one that has nothing to compare runs one row as
        long as another one has something.
        """
        unknown = {name: attached.before_pass(batch, spans) for name, attached in self._states.items()}
        self._recorded_anew = any(mask is not None and bool(mask.any()) for mask in unknown.values())
        masks = [
            d.mask(spans.drawn(d.sample)) if (mask := unknown.get(d.name)) is None else mask
            for d in self._defenses
            if d.needs_reference
        ]
        needed = torch.stack(masks).any(dim=0) if masks else spans.real
        part = part_of(spans.real, spans.segments, needed, documents=not self._sharded)
        if self._sharded:
            at_work = sum_over_ranks([float(part is None or bool(part.rows))], spans.real.device)[0]
            if part is not None and not part.rows and at_work:
                return replace(part, rows=(0,))
        return part

    def _run_reference(self, whole: Call | None, decoder: Call) -> Capture | None:
        assert self.reference is not None  # noqa: S101
        if self._part is not None and not self._part.rows:
            return None
        with self._stopwatch.running():
            if self._cache is None:
                return self.reference.run(whole, decoder, part=self._part, around=self._engaged)
            stored = not self._recorded_anew
            return self._cache.run(whole, decoder, part=self._part, around=self._engaged, stored=stored)
