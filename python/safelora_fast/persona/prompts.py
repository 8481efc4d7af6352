"""Requests as tokens, by the model's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_fast.errors import SettingsError

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
        if not self.tokenizer.chat_template:
            raise SettingsError(f"{self.source}: the tokenizer has no chat template; {REMEDY}")
        turns = [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}]
        try:
            text = str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # templates raise what they like
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SettingsError(
                f"{self.source}: the chat template refuses a system turn ({reason}); {REMEDY}"
            ) from error
        for role, content in (("system", request.system), ("user", request.user)):
            if content not in text:
                raise SettingsError(f"{self.source}: the chat template leaves out what a {role} turn says; {REMEDY}")
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
