"""Models and rows that the measures share: what is loaded for one of them is at hand for the next."""

from __future__ import annotations

import gc
from functools import cached_property
from typing import TYPE_CHECKING, Any

from safelora_fast.data.rows import read_rows
from safelora_fast.data.tokens import Encoder
from safelora_fast.models.load import ModelSection, Subject, SubjectSettings, load_subject
from safelora_fast.recipe.yaml_section import read_section

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from safelora_fast.compare.config import CompareConfig
    from safelora_fast.data.rows import RowSet
    from safelora_fast.data.tokens import Examples


class Workbench:
    """What the runs of a configuration are measured with.

    Args:
        config: the comparison.
        progress: told how far a measurement is; see :class:`~safelora_fast.files.progress.ProgressBar`.
    """

    def __init__(self, config: CompareConfig, progress: Any = None) -> None:
        self.config = config
        self.progress = progress
        model = read_section(config.document, ("recipe", "model"), ModelSection)
        self.settings = SubjectSettings(
            model.path,
            config.measure.dtype,
            config.measure.device,
            model.chat_template,
            model.trust_remote_code,
            model.template_args,
        ).resolved()
        self.strings = config.recipe.get("data", {}).get("strings", "chat")
        self.judge_gone: str | None = None  # why the judge is not asked any more until the next call
        self._latest: tuple[Path | None, Subject] | None = None

    @cached_property
    def reference(self) -> Subject:
        """The model before the fine-tune."""
        return load_subject(self.settings)

    def subject(self, adapter: Path | None) -> Subject:
        """The model with an adapter on it; the latest one is kept, until another is loaded."""
        if adapter is None:
            return self.reference
        if self._latest is None or self._latest[0] != adapter:
            self._latest = adapter, self.another(adapter)
        return self._latest[1]

    def another(self, adapter: Path | None) -> Subject:
        """A model of the caller's own, to change as he likes; beside it the reference is in memory at most."""
        self.release()
        return load_subject(self.settings, adapter)

    def release(self, *, reference: bool = False) -> None:
        """Let go of the latest model, so that the next one finds its memory free.

        Args:
            reference: of the model before the fine-tune too, for a measure that loads its model itself.
        """
        import torch

        self._latest = None
        if reference:
            self.__dict__.pop("reference", None)
        gc.collect()  # models hold themselves in circles
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    @cached_property
    def rows(self) -> dict[str, RowSet]:
        """The rows whose loss is measured, by their name."""
        measure = self.config.measure
        sources = {"narrow": measure.narrow, "general": measure.general}
        return {name: read_rows(source, measure.max_rows) for name, source in sources.items() if source is not None}

    def examples(self, name: str, subject: Subject) -> Examples:
        """Rows as the subject's own tokenizer reads them."""
        return Encoder(subject.tokenizer, strings=self.strings).encode(self.rows[name]).examples

    def counting(self, what: str, total: int) -> Callable[[int], None] | None:
        """Show that so many things begin; returns what is told how many are done."""
        if self.progress is None:
            return None
        self.progress.start(what, total)
        advance: Callable[[int], None] = self.progress.advance
        return advance
