"""Extract a persona vector from a trait and a model."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from safelora_fast.errors import InterruptedRunError, SettingsError, TrainingError
from safelora_fast.files.output import check_file
from safelora_fast.files.progress import ProgressBar, bar_on_a_terminal
from safelora_fast.models.model_settings import ModelSection
from safelora_fast.persona.response_filter import Judge, keep
from safelora_fast.persona.responses import Journal, Response, requests
from safelora_fast.persona.trait import Trait, load_trait
from safelora_fast.persona_vector import PersonaVector, Separation
from safelora_fast.recipe.run_metrics import versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from safelora_fast.persona.responses import Request
    from safelora_fast.persona.source_model import SourceModel

THRESHOLD = 50.0
DECISIVE = ("dtype", "weights", "tokenizer", "chat_template", "ends")  # of the model: these determine its responses


class Progress(Protocol):
    """Receives the progress of an extraction."""

    def start(self, what: str, total: int, done: int) -> None:
        """Start a stage of `total` items, of which `done` are finished already."""

    def advance(self, done: int) -> None:
        """Report that `done` items are finished."""


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled; see :func:`extract_persona_vector`."""

    samples: int = 1
    seed: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 128
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.seed < 0:
            raise SettingsError(f"seed is {self.seed}, it must not be negative")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SettingsError(f"temperature is {self.temperature}, it must be finite and not negative")
        if self.temperature == 0 and self.samples > 1:
            raise SettingsError("samples of temperature 0 are all the same: ask for one, or raise the temperature")

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that determine one response."""
        return {name: getattr(self, name) for name in ("seed", "temperature", "max_new_tokens")}


def extract_persona_vector(
    model: str | Path | nn.Module,
    trait: str | Path | Trait,
    *,
    output: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    judge: Judge | None = None,
    threshold: float = THRESHOLD,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    chat_template: str | None = None,
    template_args: dict[str, Any] | None = None,
    overwrite: bool = False,
    regenerate: bool = False,
    progress: Progress | bool | None = None,
) -> PersonaVector:
    """Extract the vector of a trait from a model's own responses (Chen et al. 2025, arXiv 2507.21509).

    Every question is asked under system prompts that ask for the trait, and under others that ask for its opposite. A
    layer's vector is the mean output over the tokens of the positive responses minus that of the negative ones. The
    function also measures how well each layer separates held-out responses.

    With an output, responses are stored next to it in `<output>.responses.jsonl`. After an interruption, the same call
    resumes. A call with another judge or threshold generates nothing new.

    Args:
        model: a folder, a Hub id with an optional `@revision`, or a loaded model (which needs `tokenizer`).
        trait: a trait, its YAML file, or the name of one that comes with this package.
        output: the safetensors file to write; None writes nothing.
        tokenizer: the tokenizer of a loaded model.
        samples: responses to each question under each system prompt; the paper uses 10.
        seed: the seed of the responses; each response has its own random numbers.
        temperature: divides the logits; 0 takes the most likely token.
        max_new_tokens: the maximum length of a response.
        batch_size: responses per batch; affects only speed, memory and rounding.
        judge: scores from 0 to 100 how strongly a response shows the trait, or returns None for no score. Positive
            responses must score above the threshold, and negative ones below it.
        threshold: see `judge`.
        dtype: the dtype for a model loaded from `model`.
        device: the device for a model loaded from `model`; "auto" uses the GPU if there is one.
        chat_template: a Jinja file that replaces the tokenizer's own template, for a model loaded from `model`.
        template_args: values of template variables, for a model loaded from `model`.
        overwrite: replace an existing output.
        regenerate: discard responses of an earlier run.
        progress: receives progress. None shows a bar if standard error is a terminal; False shows nothing.

    Raises:
        SettingsError: trait, model and settings are incompatible, e.g. a chat template without system turns.
        DataError: a side has no response left, or stored responses are damaged.
        CheckpointError: the model cannot be loaded.
        OutputError: the output exists, or cannot be written.
        TrainingError: the model's outputs contain NaN or Inf, or the device ran out of memory.
        InterruptedRunError: Ctrl-C was pressed; the finished responses are kept.
    """
    sampling = Sampling(samples, seed, temperature, max_new_tokens, batch_size)
    trait = trait if isinstance(trait, Trait) else load_trait(trait)
    target = None if output is None else Path(output)
    if target is not None:
        if target.suffix != ".safetensors":
            raise SettingsError(f"{target}: a persona vector is a .safetensors file")
        check_file(target, [], overwrite=overwrite)
    from safelora_fast.persona.source_model import SourceModel

    if isinstance(model, str | Path):
        section = ModelSection(str(model), dtype, device, chat_template=chat_template, template_args=template_args)
        source = SourceModel.load(section)
    else:
        source = SourceModel.of(model, tokenizer)
    facts = source.describe()
    journal = None
    if target is not None:
        decisive = {name: facts[name] for name in DECISIVE} | sampling.decisive
        journal = Journal.beside(target, {"model": source.source, **decisive})
    extraction = _Extraction(source, trait, sampling, journal)
    if journal is not None and regenerate:
        journal.remove()
    with bar_on_a_terminal(progress) as told, extraction.resumable():
        extraction.progress = told or ProgressBar(wanted=False)
        kept, counts = keep(extraction.respond(), judge, threshold)
        vectors, separation = extraction.average(kept)
    settings = {**sampling.decisive, "samples": samples, "threshold": None if judge is None else threshold}
    provenance = {
        "model": facts,
        "trait": {"description": trait.description, "sha256": trait.sha256},
        "settings": settings,
        "counts": counts,
        "versions": versions(),
    }
    vector = PersonaVector(vectors, trait.name, separation, provenance, None if target is None else str(target))
    if target is not None:
        vector.save(target)
    return vector


class _Extraction:
    """The steps of one extraction."""

    def __init__(self, source: SourceModel, trait: Trait, sampling: Sampling, journal: Journal | None) -> None:
        source.anatomy.check_outputs(owner="persona vectors")
        self.progress: Progress = ProgressBar(wanted=False)
        self._source, self._sampling, self._journal = source, sampling, journal
        self._requests = requests(trait, sampling.samples)
        self._prompts = {request.id: source.prompt(request) for request in self._requests}
        longest = max(map(len, self._prompts.values()))
        room = getattr(source.anatomy.config, "max_position_embeddings", None)
        if room is not None and longest + sampling.max_new_tokens > room:
            raise SettingsError(
                f"max_new_tokens is {sampling.max_new_tokens}, with a prompt of {longest} tokens that is more than the {room} "
                f"positions of {source.source}"
            )

    def _known(self) -> dict[str, Response]:
        return {} if self._journal is None else self._journal.read(self._requests)

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """After Ctrl-C or out of memory, raise an error that says what is kept and how to resume."""
        import torch

        def kept() -> str:
            found = self._known()
            where = "" if self._journal is None else self._journal.path
            return f"{len(found)} of {len(self._requests)} responses are kept in {where}" if found else ""

        try:
            yield
        except KeyboardInterrupt:
            if not kept():
                raise
            raise InterruptedRunError(f"interrupted; {kept()}; to go on, run the same again") from None
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(
                f"out of memory ({reason}); lower batch_size; {kept() or 'no response is kept'}"
            ) from error

    def respond(self) -> list[Response]:
        """Return a response to every request, either from the journal or newly generated and added to it.

        Batches are cut from all requests, including answered ones. A resumed run therefore gives the same responses as
        an uninterrupted one.
        """
        from safelora_fast.models.reference_pass import evaluation_mode

        known, size = self._known(), self._sampling.batch_size
        if len(known) < len(self._requests):
            self.progress.start("responses", len(self._requests), len(known))
        with evaluation_mode(self._source.anatomy.model):
            for start in range(0, len(self._requests), size):
                batch = self._requests[start : start + size]
                if all(request.id in known for request in batch):
                    continue
                new = [one for one in self._generate(batch) if one.request.id not in known]
                if self._journal is not None:
                    self._journal.append(new)
                known.update((response.request.id, response) for response in new)
                self.progress.advance(len(known))
        return [known[request.id] for request in self._requests]

    def _generate(self, batch: Sequence[Request]) -> list[Response]:
        from safelora_fast.models import generate

        sampling, source = self._sampling, self._source
        completions = generate.generate_tokens(
            source.anatomy.model,
            [self._prompts[request.id] for request in batch],
            np.stack([request.draws(sampling.seed, sampling.max_new_tokens) for request in batch]),
            temperature=sampling.temperature,
            ends=source.ends,
            padding=source.padding,
        )
        return [
            Response(request, tokens, str(source.tokenizer.decode(list(tokens), skip_special_tokens=True)))
            for request, tokens in zip(batch, completions, strict=True)
        ]

    def average(self, responses: Sequence[Response]) -> tuple[np.ndarray, list[Separation]]:
        """Return the difference of the two sides [layers, hidden] float32, and how well each layer separates them."""
        from safelora_fast.models.reference_pass import evaluation_mode
        from safelora_fast.persona import activations

        self.progress.start("activations", len(responses), 0)
        with evaluation_mode(self._source.anatomy.model):
            means = activations.response_means(
                self._source.anatomy,
                [self._prompts[response.request.id] for response in responses],
                [response.tokens for response in responses],
                batch_size=self._sampling.batch_size,
                padding=self._source.padding,
                advance=self.progress.advance,
            )
        if not np.isfinite(means).all():
            layer = int(np.flatnonzero(~np.isfinite(means).all(axis=(0, 2)))[0])
            raise TrainingError(f"{self._source.source}: layer {layer} gives NaN or Inf; try another dtype")
        positive = np.array([response.request.side == "positive" for response in responses])
        halves = np.array([response.request.question % 2 for response in responses])
        vectors = activations.mean_difference(means, positive).astype(np.float32)
        return vectors, activations.separations(means, positive, halves)
