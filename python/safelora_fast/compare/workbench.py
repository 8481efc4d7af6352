"""The models and data that the measures share, so that each is loaded once."""

from __future__ import annotations

import gc
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.configuration.yaml_section import read_section
from safelora_fast.data.rows import read_rows
from safelora_fast.data.tokens import Encoder
from safelora_fast.errors import DataError
from safelora_fast.files.progress import ProgressBar
from safelora_fast.models.load import Subject, load_subject, load_tokenizer
from safelora_fast.models.model_settings import ModelSection, SubjectSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from safelora_fast.compare.comparison import CompareConfig
    from safelora_fast.data.rows import RowSet
    from safelora_fast.data.tokens import Examples
    from safelora_fast.scoring.drift import Predictor


class Workbench:
    """The models and data of a comparison.

    Args:
        config: the comparison.
        progress: progress bar of the measurements; None shows nothing.
    """

    def __init__(self, config: CompareConfig, progress: Any = None) -> None:
        self.config = config
        self.progress = progress or ProgressBar(wanted=False)
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
        self.judge_gone: str | None = None  # why this call sends the judge no more requests
        self._latest: tuple[Path | None, Subject] | None = None

    @cached_property
    def reference(self) -> Subject:
        """The model before the fine-tune."""
        return load_subject(self.settings)

    @cached_property
    def reference_predictor(self) -> Predictor:
        """The predictions of the reference, whose hidden states are computed once for all runs."""
        from safelora_fast.scoring.drift import Predictor

        return Predictor(self.reference.model, keep=True)

    def subject(self, adapter: Path | None) -> Subject:
        """Return the model with an adapter; the latest one is cached."""
        if adapter is None:
            return self.reference
        if self._latest is None or self._latest[0] != adapter:
            self._latest = adapter, self.another(adapter)
        return self._latest[1]

    def another(self, adapter: Path | None) -> Subject:
        """Load a model that the caller may change; at most the reference is in memory beside it."""
        self.release()
        return load_subject(self.settings, adapter, like=self.__dict__.get("reference"))

    def release(self, *, reference: bool = False) -> None:
        """Free the latest model, and with `reference` also the reference, for a measure that loads its own model."""
        import torch

        self._latest = None
        if reference:
            self.__dict__.pop("reference", None)
            self.__dict__.pop("reference_predictor", None)
        gc.collect()  # models contain reference cycles
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    @property
    def row_sources(self) -> dict[str, str]:
        """Where the examples come from whose loss is measured, by set name."""
        measure = self.config.measure
        sources = {"narrow": measure.narrow, "general": measure.general}
        return {name: source for name, source in sources.items() if source is not None}

    @cached_property
    def rows(self) -> dict[str, RowSet]:
        """The examples whose loss is measured, by set name, without data that are not on this machine.

        Only a report is made without them: :func:`~safelora_fast.compare.compare.check_inputs` asks for all.
        """
        found = {}
        for name, source in self.row_sources.items():
            try:
                found[name] = read_rows(source, self.config.measure.max_rows)
            except DataError:
                if Path(source).expanduser().exists():
                    raise
        return found

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, without the model."""
        return load_tokenizer(self.settings.section())[0]

    def examples(self, name: str, tokenizer: PreTrainedTokenizerBase) -> Examples:
        """Return a set as token ids."""
        return Encoder(tokenizer, strings=self.strings).encode(self.rows[name]).examples

    def counting(self, what: str, total: int) -> Callable[[int], None]:
        """Start a progress bar of `total` items; return a function that takes the number done."""
        self.progress.start(what, total)
        advance: Callable[[int], None] = self.progress.advance
        return advance
