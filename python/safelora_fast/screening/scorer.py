"""The values of one example in a screen: projections on persona vectors, and log-likelihoods; and their journal."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from safelora_fast.data.chat import answer_ends
from safelora_fast.data.rows import Row
from safelora_fast.data.tokens import IGNORED_LABEL
from safelora_fast.errors import DataError
from safelora_fast.files.json_reader import NUMBER, Kind
from safelora_fast.models.anatomy import dissect
from safelora_fast.models.reference_pass import evaluation_mode
from safelora_fast.models.token_means import token_means
from safelora_fast.selection.candidates import Candidates
from safelora_fast.selection.journal import Journal
from safelora_fast.selection.perplexity import Perplexities

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from safelora_fast.defenses.steering_vector import Direction
    from safelora_fast.scoring import Labelled


class ScreenScorer:
    """Computes projections, then negative log-likelihoods if there are misaligned adapters, or no vectors.

    The projection of a completion is a·v/‖v‖, where a is the mean output of the vector's layer over the completion's
    tokens without those that end a turn, and v is the vector (Chen et al., arXiv 2507.21509, section 2).

    Args:
        model: the model before training.
        tokenizer: its tokenizer.
        directions: persona vectors with their layers.
        adapters: misaligned adapters by name; they are attached to the model until :meth:`close`.
        tokens_per_batch: maximum number of tokens in a batch, padding included.

    Raises:
        SettingsError: a vector does not fit the model.
        AdapterError: an adapter does not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        directions: Sequence[Direction],
        adapters: Mapping[str, Path],
        *,
        tokens_per_batch: int,
    ) -> None:
        self._model = model
        self._anatomy = dissect(model)
        self._ends = torch.tensor(answer_ends(model, tokenizer))
        self._padding = int(tokenizer.pad_token_id or 0)
        for direction in directions:
            direction.check(self._anatomy, owner="screen")
        if directions:
            self._anatomy.check_outputs(owner="screen")
        self._layers = [direction.layer % self._anatomy.depth for direction in directions]
        self._units = [direction.values.double() / direction.values.double().norm() for direction in directions]
        scored = bool(adapters) or not directions
        self._perplexities = Perplexities(model, adapters, tokens_per_batch=tokens_per_batch) if scored else None

    def of(self, examples: Sequence[Labelled], places: Sequence[str]) -> list[tuple[float, ...]]:
        """Return each example's projections, in units of the hidden states, then its negative log-likelihoods in nats.

        Raises:
            DataError: a projection is NaN or infinite.
            AdapterError: a likelihood is NaN or infinite.
        """
        values: list[tuple[float, ...]] = [()] * len(examples)
        if self._units:
            projections = self._projections(examples)
            for place, row in zip(places, projections, strict=True):
                if not row.isfinite().all():
                    raise DataError(f"{place}: the hidden states of its completion are not finite")
            values = [tuple(row.tolist()) for row in projections]
        if self._perplexities is not None:
            nll = self._perplexities.of(examples, places)
            values = [one + other for one, other in zip(values, nll, strict=True)]
        return values

    def _projections(self, examples: Sequence[Labelled]) -> torch.Tensor:
        sequences = [example.ids for example in examples]
        places = [self._places(example) for example in examples]
        layers = list(dict.fromkeys(self._layers))
        with self._off(), evaluation_mode(self._model):
            means = token_means(self._anatomy, sequences, places, layers, self._padding).double().cpu()  # [B, L, H]
        columns = [means[:, layers.index(layer)] @ unit for layer, unit in zip(self._layers, self._units, strict=True)]
        return torch.stack(columns, dim=1)

    def _places(self, example: Labelled) -> list[int]:
        """Return the positions of the completion's tokens, without those that end a turn unless there are no others."""
        labels = torch.tensor(example.labels)
        answer = labels != IGNORED_LABEL
        words = answer & ~torch.isin(labels, self._ends)
        places: list[int] = torch.nonzero(words if words.any() else answer).flatten().tolist()
        return places

    def _off(self) -> AbstractContextManager[None]:
        return nullcontext() if self._perplexities is None else self._perplexities.off()

    def pass_over(self, examples: Sequence[Labelled]) -> None:
        """Skip a batch whose values are known."""
        if self._perplexities is not None:
            self._perplexities.pass_over(examples)

    def close(self) -> None:
        """Remove the adapters from the model."""
        if self._perplexities is not None:
            self._perplexities.close()


class ScreenJournal(Journal):
    """The journal of a screen: for each example, its projections and then its negative log-likelihoods."""

    key = "values"
    kind = Kind("any size", NUMBER.fits)

    @property
    def count(self) -> int:
        """Number of values of one example."""
        vectors, adapters = len(self._settings["vectors"]), len(self._settings["adapters"])
        return vectors + (1 + adapters if adapters or not vectors else 0)


class OwnCompletions(Candidates):
    """The same examples with the model's own completion, a text in another column, in place of theirs.

    Args:
        path: the JSONL file.
        column: name of the column.

    Raises:
        DataError: an example has no such text, or more than one completion.
    """

    def __init__(self, path: str | Path, column: str) -> None:
        self._column = column
        super().__init__(path)

    def row(self, index: int) -> Row:
        """Return the example at an index."""
        row, own = super().row(index), self.record(index).get(self._column)
        if not isinstance(own, str):
            raise DataError(f"{row.place}: has no text in {self._column!r}, the model's own completion; drop --own")
        if isinstance(row.completion, str):
            return Row(row.place, row.prompt, own)
        answers = [number for number, turn in enumerate(row.completion) if turn["role"] == "assistant"]
        if answers != [len(row.completion) - 1]:
            raise DataError(
                f"{row.place}: has not exactly one completion, at the end, as the model's own one; drop --own"
            )
        return Row(row.place, row.prompt, [*row.completion[:-1], {"role": "assistant", "content": own}])
