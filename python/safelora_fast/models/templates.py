"""User-provided chat templates: a file that replaces the tokenizer's template, and template arguments."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.data.chat import has_template
from safelora_fast.errors import CheckpointError, SettingsError
from safelora_fast.files.json_reader import read_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from safelora_fast.models.model_settings import ModelSection

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z]\w*")
TAKEN = {"messages", "add_generation_prompt", "continue_final_message"}  # reserved: every call sets them


def give_template(tokenizer: PreTrainedTokenizerBase, model: ModelSection) -> bool:
    """Apply the chat template and template arguments of a model's settings; return whether there are any.

    Arguments are written at the top of the template, so they are saved with it and apply wherever it is used.

    Raises:
        CheckpointError: the file cannot be read or parsed, or the tokenizer does not accept a template.
        SettingsError: the template does not read an argument.
    """
    if model.chat_template is not None:
        try:
            template = read_bytes(Path(model.chat_template).expanduser()).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{model.chat_template}: the chat template cannot be read: {error}") from error
        if not _takes_template(tokenizer):
            raise CheckpointError(
                f"{model.chat_template}: the tokenizer of {model.path} ({type(tokenizer).__name__}) writes conversations by code "
                "of its own and takes no chat template: leave it out, or give the model with a tokenizer.json"
            )
        _check_syntax(tokenizer, model.chat_template, template)
        tokenizer.chat_template = template
    give_arguments(tokenizer, model.template_args)
    return model.chat_template is not None or bool(model.template_args)


def give_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None) -> None:
    """Set variables of a tokenizer's chat template, e.g. `enable_thinking`.

    Raises:
        SettingsError: there is no template, it does not read an argument, or a value is not JSON.
    """
    if not arguments:
        return
    template: Any = getattr(tokenizer, "chat_template", None)
    if not template:
        raise SettingsError(f"template_args: the tokenizer has no chat template that could read {', '.join(arguments)}")
    lines = []
    for name, value in arguments.items():
        if not NAME.fullmatch(name) or name in TAKEN:
            raise SettingsError(f"template_args: {name!r} cannot be an argument of a chat template")
        if not re.search(rf"\b{name}\b", json.dumps(template)):
            raise SettingsError(f"template_args: the chat template does not read {name}: see which variables it has")
        lines.append(f"{{% set {name} = {_literal(name, value)} %}}\n")  # Jinja drops the newline after a block
    head = "".join(lines)
    if "null" in head:  # JSON's null is Jinja's none
        head = "{% set null = none %}\n" + head
    if isinstance(template, dict):
        tokenizer.chat_template = {key: head + one for key, one in template.items()}
    else:
        tokenizer.chat_template = head + template


def adapters_template(
    tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, model: ModelSection, adapter: str
) -> PreTrainedTokenizerBase:
    """Set the chat template of an adapter's tokenizer: the user's file, else the tokenizer's own, else the model's.

    Args:
        tokenizer: the adapter's tokenizer.
        own: the model's tokenizer, with the user's template if there is one, and without template arguments.
        model: the model's settings.
        adapter: the adapter's name, for messages.

    Raises:
        SettingsError: the template does not read an argument.
    """
    template = getattr(own, "chat_template", None)
    lacking = not has_template(tokenizer)
    if template and (lacking or model.chat_template is not None):
        tokenizer.chat_template = template
    if template and lacking and model.chat_template is None:
        logger.warning("%s: the adapter's tokenizer has no chat template: that of %s is used", adapter, model.path)
    give_arguments(tokenizer, model.template_args)
    return tokenizer


def read_arguments(words: Sequence[str] | None) -> dict[str, Any] | None:
    """Parse template arguments of the command line: NAME=VALUE, with the value as JSON or else text, or a JSON object.

    Raises:
        SettingsError: a word has neither form.
    """
    found: dict[str, Any] = {}
    for word in words or ():
        name, equals, value = word.partition("=")
        if word.lstrip().startswith("{"):
            given = _json(word)
            if not isinstance(given, dict):
                raise SettingsError(f"--template-args: {word!r} is not a JSON object")
            found.update(given)
        elif equals:
            known = {"True": True, "False": False, "None": None}
            found[name.strip()] = known[value] if value in known else _json(value)
        else:
            raise SettingsError(f"--template-args: {word!r} must be NAME=VALUE, or a JSON object")
    return found or None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _literal(name: str, value: Any) -> str:
    """Return a value as a Jinja literal: JSON, where null is defined by :func:`give_arguments`."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"template_args: {name} is {value!r}, it must be a JSON value") from error


def _check_syntax(tokenizer: PreTrainedTokenizerBase, file: str, template: str) -> None:
    """Raise CheckpointError, with the line, if a template cannot be parsed. Errors of rendering are found with real turns."""
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        raise CheckpointError(f"{file}:{error.lineno}: the chat template cannot be parsed: {error.message}") from error
    except Exception:  # noqa: S110 - a template may refuse these turns
        pass


def _takes_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    from transformers import PreTrainedTokenizerBase as Base

    if getattr(type(tokenizer), "apply_chat_template", None) is Base.apply_chat_template:
        return True
    turns = [{"role": "user", "content": "a"}]
    try:
        return str(tokenizer.apply_chat_template(turns, chat_template="{{ 'b' }}", tokenize=False)) == "b"
    except Exception:  # another library's code can raise any exception
        return False
