"""Requests as tokens, by the model's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_fast.data.chat import REFUSES, chat_of, has_template
from safelora_fast.errors import DataError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from safelora_fast.persona.responses import Request

REMEDY = "a trait is asked for in system turns; give a chat template that has them, or another model"


@dataclass(frozen=True)
class Prompts:
    """Makes requests into tokens.

    Attributes:
        tokenizer: the model's.
        source: the model, for messages.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str

    def tokens(self, request: Request) -> list[int]:
        """The tokens up to where the answer begins.

        Raises:
            SettingsError: there is no chat template, or it has no system turns.
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
