"""The model that a persona vector is extracted from, either loaded here or passed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import find_model
from safelora_fast.data.chat import REFUSES, answer_ends, chat_of, has_template
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.models.anatomy import Anatomy, dissect
from safelora_fast.models.digests import template_digest, tokenizer_digest, weights_digest
from safelora_fast.models.load import load_pretrained, load_tokenizer, place
from safelora_fast.models.model_settings import chosen_device

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from safelora_fast.models.model_settings import ModelSection
    from safelora_fast.persona.responses import Request

REMEDY = "a trait is asked for in system turns; give a chat template that has them, or another model"


@dataclass(frozen=True)
class SourceModel:
    """A model with its tokenizer.

    Attributes:
        anatomy: the model's parts.
        tokenizer: its tokenizer.
        source: a path, a Hub id, or the name of the model's class.
        revision: the commit on the Hub; None for a folder.
    """

    anatomy: Anatomy
    tokenizer: PreTrainedTokenizerBase
    source: str
    revision: str | None

    @classmethod
    def load(cls, section: ModelSection) -> SourceModel:
        """Load model and tokenizer onto their device.

        Raises:
            CheckpointError: the model or the tokenizer cannot be loaded.
            SettingsError: there is no GPU, or the model's layers cannot be found.
        """
        device = chosen_device(section.device)
        tokenizer, _ = load_tokenizer(section)
        model = place(load_pretrained(section), device)
        return cls(dissect(model), tokenizer, section.path, find_model(section.path).commit)

    @classmethod
    def of(cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> SourceModel:
        """Wrap a loaded model unchanged; its active adapters stay active.

        Raises:
            SettingsError: the tokenizer is missing, the model's layers cannot be found, or its adapter is a learned
                prompt.
        """
        if tokenizer is None:
            raise SettingsError("a loaded model needs its tokenizer beside it: tokenizer=")
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise SettingsError(
                f"the model's adapter is a learned prompt ({model.active_peft_config.peft_type}), which persona extraction "
                "would leave out: give the model without it, or another kind of adapter"
            )
        anatomy = dissect(model)
        config = anatomy.model.config
        source = getattr(config, "_name_or_path", "") or type(anatomy.model).__name__
        return cls(anatomy, tokenizer, str(source), getattr(config, "_commit_hash", None))

    def prompt(self, request: Request) -> list[int]:
        """Return the tokens of a request, up to the start of the response.

        Raises:
            SettingsError: the chat template is missing, or it has no system turns.
        """
        if not has_template(self.tokenizer):
            raise SettingsError(f"{self.source}: the tokenizer has no chat template; {REMEDY}")
        turns = [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}]
        try:
            return chat_of(self.tokenizer).prompt(turns, self.source)
        except DataError as error:
            message, refuses, reason = str(error).partition(REFUSES)
            why = f"{message}the chat template refuses a system turn ({reason})" if refuses else message
            raise SettingsError(f"{why}; {REMEDY}") from error

    @property
    def ends(self) -> list[int]:
        """Tokens that end a response.

        Raises:
            SettingsError: neither model nor tokenizer names one.
        """
        found = answer_ends(self.anatomy.model, self.tokenizer)
        if not found:
            raise SettingsError(f"{self.source}: neither model nor tokenizer names a token that ends an answer")
        return found

    @property
    def padding(self) -> int:
        """The padding token."""
        token = self.tokenizer.pad_token_id
        return self.ends[0] if token is None else int(token)

    def describe(self) -> dict[str, Any]:
        """Return source, revision, dtype, end tokens, and digests of weights, tokenizer and template, for JSON."""
        weight = self.anatomy.model.get_input_embeddings().weight
        return {
            "source": self.source,
            "revision": self.revision,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "weights": weights_digest(self.anatomy.model),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "chat_template": template_digest(self.tokenizer),
            "ends": self.ends,
        }
