"""From a trait and a model to a persona vector."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from safelora_fast.errors import InterruptedRunError, SettingsError, TrainingError
from safelora_fast.files.output import check_file
from safelora_fast.files.progress import bar_on_a_terminal
from safelora_fast.models.load import ModelSection
from safelora_fast.persona.requests import Prompts
from safelora_fast.persona.response_filter import Judge, keep
from safelora_fast.persona.responses import Journal, Request, Response, requests
from safelora_fast.persona.separation import mean_difference, separations
from safelora_fast.persona.trait import Trait, load_trait
from safelora_fast.persona_vector import PersonaVector, Separation
from safelora_fast.recipe.run_metrics import versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from safelora_fast.persona.source_model import Subject

THRESHOLD = 50.0
DECISIVE = ("dtype", "weights", "tokenizer", "chat_template", "ends")  # facts of the model that decide what it answers


class Progress(Protocol):
    """Told how far an extraction is."""

    def start(self, what: str, total: int, done: int) -> None:
        """Some work begins: so many things are to be done, of which so many are done already."""

    def advance(self, done: int) -> None:
        """So many are done."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        samples: answers to each question under each system prompt; the paper's is 10.
        seed: of all draws.
        temperature: divides the logits; 0 takes the likeliest token.
        max_new_tokens: longest answer.
        batch_size: answers at once; decides speed and memory, and nothing else but rounding.
    """

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
        """The settings that decide what one request is answered."""
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
    """Extract the vector of a trait from a model's own answers (Chen et al. 2025, arXiv 2507.21509).

    Every question is asked under system prompts that ask for the trait and under others that ask for its opposite. Of each
    answer the output of every block is averaged over the answer's tokens; the vector of a block is the mean over the
    answers to the first minus that over the answers to the second. How well each block separates answers that its vector
    was not computed from is measured on the way.

    With an output, answers are kept beside it in `<output>.responses.jsonl` as they come: after an interruption the same call
    goes on, and a call with another judge or threshold generates nothing anew.

    Args:
        model: a folder, a Hub id with an optional `@revision`, or a loaded model (then with its tokenizer).
        trait: a trait, its YAML file, or the name of one that comes with this package.
        output: the safetensors file to write; None writes nothing.
        tokenizer: of a loaded model.
        samples: answers to each question under each system prompt; the paper's is 10.
        seed: of the answers; each is drawn with numbers of its own, so that it does not depend on the others.
        temperature: of the answers; 0 takes the likeliest token.
        max_new_tokens: longest answer.
        batch_size: answers at once.
        judge: scores a response from 0 to 100 by how much of the trait it shows, or None for no score; positive responses
            count above the threshold, negative ones below.
        threshold: see `judge`.
        dtype: of a model that is loaded.
        device: of a model that is loaded; "auto" is the GPU where there is one.
        chat_template: a Jinja file in the place of the tokenizer's own template, for a model that is loaded.
        template_args: values of variables that the template reads, for a model that is loaded.
        overwrite: replace an output that exists.
        regenerate: forget responses of an earlier run.
        progress: told how far it is; None shows a bar where standard error is a terminal, False nothing.

    Raises:
        SettingsError: trait, model and settings do not go together, e.g. a chat template without system turns.
        DataError: no response of a side is left, or stored responses are damaged.
        CheckpointError: the model cannot be loaded.
        OutputError: the output exists, or cannot be written.
        TrainingError: the model gives NaN, or the device ran out of memory.
        InterruptedRunError: Ctrl-C; the answers that were finished are kept.
    """
    sampling = Sampling(samples, seed, temperature, max_new_tokens, batch_size)
    if not isinstance(trait, Trait):
        trait = load_trait(trait)
    target = None if output is None else Path(output)
    if target is not None:
        if target.suffix != ".safetensors":
            raise SettingsError(f"{target}: a persona vector is a .safetensors file")
        check_file(target, [], overwrite=overwrite)
    from safelora_fast.persona.source_model import Subject

    if isinstance(model, str | Path):
        subject = Subject.load(
            ModelSection(str(model), dtype, device, chat_template=chat_template, template_args=template_args)
        )
    else:
        subject = Subject.of(model, tokenizer)
    extraction = _Extraction(subject, trait, sampling)
    described = subject.describe()
    journal = None
    if target is not None:
        decisive = {name: described[name] for name in DECISIVE} | sampling.decisive
        journal = Journal.beside(target, {"model": subject.source, **decisive})
        if regenerate:
            journal.remove()
    with bar_on_a_terminal(progress) as extraction.progress, _resumable(journal, extraction.requests):
        kept, counts = keep(extraction.respond(journal), judge, threshold)
        vectors, separation = extraction.average(kept)
    provenance = {
        "model": described,
        "trait": {"description": trait.description, "sha256": trait.sha256},
        "settings": {
            **sampling.decisive,
            "samples": samples,
            "threshold": None if judge is None else threshold,
        },
        "counts": counts,
        "versions": versions(),
    }
    vector = PersonaVector(vectors, trait.name, separation, provenance, None if target is None else str(target))
    if target is not None:
        vector.save(target)
    return vector


@contextmanager
def _resumable(journal: Journal | None, wanted: Sequence[Request]) -> Iterator[None]:
    """Say after Ctrl-C, or when memory runs out, what is kept and how to go on."""
    import torch

    def kept() -> str:
        found = {} if journal is None else journal.read(wanted)
        return (
            ""
            if journal is None or not found
            else f"{len(found)} of {len(wanted)} responses are kept in {journal.path}"
        )

    try:
        yield
    except KeyboardInterrupt:
        if not kept():
            raise
        raise InterruptedRunError(f"interrupted; {kept()}; to go on, run the same again") from None
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"out of memory ({reason}); lower batch_size; {kept() or 'no response is kept'}") from error


class _Extraction:
    """The steps of one extraction."""

    def __init__(self, subject: Subject, trait: Trait, sampling: Sampling) -> None:
        subject.anatomy.check_outputs(owner="persona vectors")
        self._subject = subject
        self._sampling = sampling
        self.progress: Progress | None = None
        self.requests = requests(trait, sampling.samples)
        prompts = Prompts(subject.tokenizer, subject.source)
        self._prompts = {request.id: prompts.tokens(request) for request in self.requests}
        longest = max(map(len, self._prompts.values()))
        room = getattr(subject.anatomy.config, "max_position_embeddings", None)
        if room is not None and longest + sampling.max_new_tokens > room:
            raise SettingsError(
                f"max_new_tokens is {sampling.max_new_tokens}, with a prompt of {longest} tokens that is more than the {room} "
                f"positions of {subject.source}"
            )

    def respond(self, journal: Journal | None) -> list[Response]:
        """A response to every request: from the journal, or generated and added to it.

        Batches are cut from all requests, those of an earlier run included: whoever goes on gets what an unbroken run
        gets.
        """
        known: dict[str, Response] = {} if journal is None else journal.read(self.requests)
        if len(known) < len(self.requests):
            self._start("responses", len(self.requests), len(known))
            self._generate(known, journal)
        return [known[request.id] for request in self.requests]

    def _generate(self, known: dict[str, Response], journal: Journal | None) -> None:
        from safelora_fast.models.reference_pass import evaluation_mode

        size = self._sampling.batch_size
        with evaluation_mode(self._subject.anatomy.model):
            for start in range(0, len(self.requests), size):
                batch = self.requests[start : start + size]
                if all(request.id in known for request in batch):
                    continue
                new = [one for one in self._answer(batch) if one.request.id not in known]
                if journal is not None:
                    journal.append(new)
                known.update((response.request.id, response) for response in new)
                if self.progress is not None:
                    self.progress.advance(len(known))

    def _answer(self, batch: Sequence[Request]) -> list[Response]:
        from safelora_fast.models.generate import generate_tokens

        sampling, subject = self._sampling, self._subject
        answers = generate_tokens(
            subject.anatomy.model,
            [self._prompts[request.id] for request in batch],
            np.stack([request.draws(sampling.seed, sampling.max_new_tokens) for request in batch]),
            temperature=sampling.temperature,
            ends=subject.ends,
            padding=subject.padding,
        )
        return [
            Response(request, tokens, str(subject.tokenizer.decode(list(tokens), skip_special_tokens=True)))
            for request, tokens in zip(batch, answers, strict=True)
        ]

    def average(self, responses: Sequence[Response]) -> tuple[np.ndarray, list[Separation]]:
        """The difference of the two sides [blocks, hidden] float32, and how well each block separates them."""
        from safelora_fast.models.reference_pass import evaluation_mode
        from safelora_fast.persona.activations import response_means

        self._start("activations", len(responses), 0)
        with evaluation_mode(self._subject.anatomy.model):
            means = response_means(
                self._subject.anatomy,
                [self._prompts[response.request.id] for response in responses],
                [response.tokens for response in responses],
                batch_size=self._sampling.batch_size,
                padding=self._subject.padding,
                advance=lambda done: None if self.progress is None else self.progress.advance(done),
            )
        if not np.isfinite(means).all():
            block = int(np.flatnonzero(~np.isfinite(means).all(axis=(0, 2)))[0])
            raise TrainingError(f"{self._subject.source}: block {block} gives NaN or Inf; try another dtype")
        positive = np.array([response.request.side == "positive" for response in responses])
        halves = np.array([response.request.question % 2 for response in responses])
        return mean_difference(means, positive).astype(np.float32), separations(means, positive, halves)

    def _start(self, what: str, total: int, done: int) -> None:
        if self.progress is not None:
            self.progress.start(what, total, done)
