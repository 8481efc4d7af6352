"""Model cards of projected and trained adapters, and the names of models and paths in published files."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from safelora_fast.checkpoints.resolver import label

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ABSOLUTE = re.compile(r"(?<![\w.:/])~?/(?:[^\s/,;'\"]+/)+[^\s/,;:'\"]+")
HUB_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(title: str, body: Iterable[str], *, model: str, also: str | None = None) -> str:
    """Return the model card of a PEFT adapter: Markdown with the front matter that the Hub reads.

    Args:
        title: the title of the page.
        body: the lines between the title and the sections "Use" and "Sources".
        model: path or Hub id of the model that the adapter belongs to.
        also: another name of that model. The front matter and the example of use name the first of the two that is a
            Hub id. If neither is, the front matter names none, because the Hub rejects a card whose base model is a path.
    """
    base = next((name for source in (model, also) if source and (name := hub_id(source))), None)
    lines = [
        "---",
        "library_name: peft",
        *([] if base is None else [f"base_model: {base}"]),
        "tags:",
        "- lora",
        "- safelora",
        "- alignment",
        "---",
        "",
        f"# {title}",
        "",
        *body,
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({base or shown_model(model)!r})",
        'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
        "```",
        "",
        "## Sources",
        "",
        "- Hsu et al. 2024, Safe LoRA, arXiv 2405.16833",
        "- Kaczér et al. 2025, In-Training Defenses against Emergent Misalignment, arXiv 2508.06249",
    ]
    return "\n".join(lines) + "\n"


def table(rows: Mapping[str, str]) -> list[str]:
    """Return a Markdown table with a name and a value in each row. Values must already be Markdown."""
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items()), ""]


def escaped(text: str) -> str:
    """Return the text with pipes escaped for a table cell."""
    return text.replace("|", "\\|")


def code(text: str) -> str:
    """Return the text as code in a table cell."""
    return f"`{escaped(text)}`"


def hub_id(source: str) -> str | None:
    """Return the Hub id of a model given by id or as a folder in the Hub's cache; None for any other local model."""
    shown = label(Path(source)).partition("@")[0]
    if HUB_MODEL.fullmatch(shown) is None or (shown == source and Path(source).expanduser().exists()):
        return None
    return shown


def shown_model(source: str) -> str:
    """Return a model's Hub id, or the last part of its path."""
    return hub_id(source) or PurePath(source).name or source


def shown_paths(text: str) -> str:
    """Return the text with absolute paths cut to their last part."""
    if PurePath(text).is_absolute():
        return PurePath(text).name
    return ABSOLUTE.sub(lambda path: PurePath(path[0]).name, text)
