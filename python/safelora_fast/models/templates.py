"""Chat templates from the user: a file that replaces the tokenizer's own, and arguments of a template."""

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

    from safelora_fast.models.load import ModelSection

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z]\w*")
TAKEN = {"messages", "add_generation_prompt", "continue_final_message"}  # set by each call


def give_template(tokenizer: PreTrainedTokenizerBase, model: ModelSection) -> bool:
    """Give a tokenizer the chat template and arguments of a model's settings; return whether there are any.

    Arguments become the first lines of the template, so they are saved with it and apply wherever it is used.

    Raises:
        CheckpointError: the file cannot be read, or the tokenizer takes no template.
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
        tokenizer.chat_template = template
    give_arguments(tokenizer, model.template_args)
    return model.chat_template is not None or bool(model.template_args)


def give_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None) -> None:
    """Set variables of a tokenizer's chat template, e.g. `enable_thinking`.

    Raises:
        SettingsError: there is no template, it does not read one of them, or a value is not JSON.
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
    if "null" in head:  # JSON's name for Jinja's none
        head = "{% set null = none %}\n" + head
    if isinstance(template, dict):
        tokenizer.chat_template = {key: head + one for key, one in template.items()}
    else:
        tokenizer.chat_template = head + template


def adapters_template(
    tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, model: ModelSection, adapter: str
) -> PreTrainedTokenizerBase:
    """An adapter's tokenizer with the right template: the given file, its own, or else the model's.

    Args:
        tokenizer: the adapter's.
        own: the model's, with the given file's template if there is one, and without arguments.
        model: the settings.
        adapter: for messages.

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
    """Arguments from a command line: NAME=VALUE, each value as JSON or else as text; or a JSON object.

    Raises:
        SettingsError: a word is neither.
    """
    found: dict[str, Any] = {}
    for word in words or ():
        name, equals, value = word.partition("=")
        if word.lstrip().startswith("{"):
            given = _json(word)
            if not isinstance(given, dict):
                raise SettingsError(f"--template-args: {word!r} is no JSON object")
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
    """A value as Jinja reads it: JSON, in which :func:`give_arguments` gives null a meaning."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"template_args: {name} is {value!r}, it must be a JSON value") from error


def _takes_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    from transformers import PreTrainedTokenizerBase as Base

    if getattr(type(tokenizer), "apply_chat_template", None) is Base.apply_chat_template:
        return True
    turns = [{"role": "user", "content": "a"}]
    try:
        return str(tokenizer.apply_chat_template(turns, chat_template="{{ 'b' }}", tokenize=False)) == "b"
    except Exception:  # whatever code of another library raises
        return False
