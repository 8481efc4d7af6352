"""Records the forward passes of a model in training, and runs the reference model on the same inputs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safelora_fast.data.spans import Spans, read_spans
from safelora_fast.defenses.base import Observation
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import entrances
from safelora_fast.models.capture import Call, Capture, StudentRecorder, Tap
from safelora_fast.models.lora_factors import check_no_prompt_learning
from safelora_fast.models.reference_pass import Reference, ReferencePass, check_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from safelora_fast.defenses.base import Defense
    from safelora_fast.models.anatomy import Anatomy
    from safelora_fast.training.metrics import Stopwatch


class TrainingPasses:
    """Records the pass inside `recording()`. Hooks of defenses act inside it, and also while the model is in training mode.

    Args:
        model: the model with its wrappers.
        anatomy: parts of the model.
        reference: the reference model; None if no defense needs one.
        layers: indices of the layers to record, in both the model and the reference model.
        watched: indices of the layers to record in the model alone.
        records: whether anything is recorded.
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
        layers: Sequence[int],
        watched: Sequence[int],
        records: bool,
        stopwatch: Stopwatch,
    ) -> None:
        self._anatomy, self._stopwatch = anatomy, stopwatch
        self._running = 0
        self._spans: Spans | None = None
        self._recorder: StudentRecorder | None = None
        self.reference: ReferencePass | None = None
        if not records:
            return
        check_no_prompt_learning(model)
        if reference is not None:
            self.reference = ReferencePass(model, anatomy, reference, list(layers))
        run_reference = None if reference is None else self._run_reference
        self._recorder = StudentRecorder(Tap(anatomy, [*layers, *watched]), run_reference, entrances(model))

    def install(self, defenses: Sequence[Defense]) -> list[Any]:
        """Install the defenses' hooks on the model and on a separate reference model, and then the recording hooks.

        Returns:
            The handles that remove the defenses' hooks.
        """
        model = self._anatomy.model
        handles: list[Any] = []
        for defense in defenses:
            handles.extend(defense.install(self._anatomy, lambda: model.training or self._running > 0))
            if self.reference is not None and self.reference.anatomy.model is not model:
                handles.extend(defense.install(self.reference.anatomy, lambda: self._running > 0))
        if self._recorder is not None:
            self._recorder.attach()
        if self.reference is not None:
            self.reference.tap.attach()
        return handles

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
            self._spans = read_spans(batch)
            if self.reference is not None:
                check_inputs(Call((), batch))
            with self._recorder.recording():
                yield

    @contextmanager
    def observed(self) -> Iterator[Observation | None]:
        """Yield the recorded pass; None if nothing is recorded. It is released afterwards, to free memory for backward.

        Without a reference model, the model's own states are used as the reference's.

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
            yield Observation(self._anatomy, student, self._recorder.reference or student, spans)
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

    def _run_reference(self, whole: Call | None, decoder: Call) -> Capture:
        assert self.reference is not None  # noqa: S101
        with self._stopwatch.running():
            return self.reference.run(whole, decoder, around=self._engaged)
