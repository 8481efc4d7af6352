"""Score the examples of a file in windows of bounded memory. A journal keeps every score, so a stopped scan resumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from safelora_fast.errors import DataError
from safelora_fast.scoring import batches_by_length
from safelora_fast.selection.journal import Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

    from torch import nn

    from safelora_fast.data.tokens import Encoder, Example
    from safelora_fast.scoring import Labelled
    from safelora_fast.selection.candidates import Candidates
    from safelora_fast.selection.journal import Journal

WINDOW = 1024
TOKENS_PER_BATCH = {"cpu": 1024, "other": 16384}
NO_ANSWER, REFUSED = "no answer token", "refused by the chat template"


def default_tokens(model: nn.Module) -> int:
    """Return the number of tokens in a batch for the model's device."""
    return TOKENS_PER_BATCH["cpu" if next(model.parameters()).device.type == "cpu" else "other"]


class Scorer(Protocol):
    """Computes the values of a batch of examples."""

    def of(self, examples: Sequence[Labelled], places: Sequence[str]) -> list[tuple[float, ...]]:
        """Return the values of each example."""

    def pass_over(self, examples: Sequence[Labelled]) -> None:
        """Skip a batch whose values are known."""

    def close(self) -> None:
        """Leave the model as it was."""


@dataclass(frozen=True)
class Scan:
    """The examples to score (`wanted`, in order), and the settings for encoding and batching them."""

    examples: Candidates
    wanted: Sequence[int]
    encoder: Encoder
    max_length: int
    tokens_per_batch: int

    def run(
        self, journal: Journal, make: Callable[[], Scorer], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Score the examples that are not in the journal, and add them to it.

        Args:
            journal: the journal.
            make: creates the scorer; not called if nothing is missing.
            progress: called with the number of finished examples and the total.

        Raises:
            DataError: the journal belongs to other examples.
            SafeLoraFastError: from the scorer.
        """
        check_fingerprints(journal, self.examples)
        done, total = sum(index in journal.entries for index in self.wanted), len(self.wanted)
        if progress is not None:
            progress(done, total)
        if done == total:
            return
        scorer = make()
        try:
            for entries in self.entries(journal.entries.keys(), scorer):
                journal.add(entries)
                done += len(entries)
                if progress is not None:
                    progress(done, total)
        finally:
            scorer.close()

    def entries(self, known: Container[int], scorer: Scorer) -> Iterator[list[Entry]]:
        """Yield entries of the examples that are not known, one batch at a time.

        Batches are formed from all examples, including known ones, because rounding depends on the batch. So a
        resumed run gives the same bytes as an uninterrupted one.
        """
        for start in range(0, len(self.wanted), WINDOW):
            tokens: dict[int, Example] = {}
            skipped = []
            for index in self.wanted[start : start + WINDOW]:
                found = self._tokens(index)
                if not isinstance(found, str):
                    tokens[index] = found
                elif index not in known:
                    skipped.append(Entry(index, self.examples.fingerprint(index), skipped=found))
            if skipped:
                yield skipped
            indices = list(tokens)
            lengths = [len(tokens[index].ids) for index in indices]
            for batch in batches_by_length(lengths, self.tokens_per_batch):
                some = [indices[position] for position in batch]
                if all(index in known for index in some):
                    scorer.pass_over([tokens[index] for index in some])
                    continue
                places = [self.examples.place(index) for index in some]
                values = scorer.of([tokens[index] for index in some], places)
                yield [
                    Entry(index, self.examples.fingerprint(index), one)
                    for index, one in zip(some, values, strict=True)
                    if index not in known
                ]

    def _tokens(self, index: int) -> Example | str:
        """Return an example as tokens, or the reason to skip it."""
        try:
            example = self.encoder.example(self.examples.row(index))
        except DataError:
            return REFUSED
        if len(example.ids) > self.max_length:
            return f"more than {self.max_length} tokens"
        return example if example.answer else NO_ANSWER


def check_fingerprints(journal: Journal, examples: Candidates) -> None:
    """Check that a journal belongs to these examples.

    Raises:
        DataError: an example has changed; the message names it.
    """
    for index, entry in journal.entries.items():
        if index >= len(examples) or examples.fingerprint(index) != entry.fingerprint:
            raise DataError(
                f"{journal.path}: example {index + 1} of {examples.source} is not what was scored: the file has "
                "changed; delete the journal, or choose another output"
            )
