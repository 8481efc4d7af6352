"""Judges by their Inspect names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from safelora_fast.errors import MissingDependencyError, SettingsError, how_to_install
from safelora_fast.evaluation.secrets import redact
from safelora_fast.posthoc.resolver import find_model

if TYPE_CHECKING:
    from inspect_ai.model import Model

USER_IN_URL = re.compile(r"://[^/]*@")


def check_inspect() -> None:
    """Refuse to go on without Inspect.

    Raises:
        MissingDependencyError: with how to install it.
    """
    try:
        import inspect_ai  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"judging needs inspect-ai: {how_to_install('eval')}") from error


def find_judge(name: str, url: str | None = None) -> Model:
    """A model as Inspect names it. Its credential comes from the environment, as its provider says.

    Args:
        name: provider/model, e.g. openai-api/local/my-model, vllm/…, hf/….
        url: of an endpoint, in the place of the provider's own.

    Raises:
        CheckpointError: there is no such model to load for a judge hf/….
        SettingsError: Inspect cannot make it; or the URL holds a credential.
        MissingDependencyError: its provider needs a package that is not installed.
    """
    from inspect_ai._util.error import PrerequisiteError
    from inspect_ai.model import get_model

    if url is not None and USER_IN_URL.search(url):
        raise SettingsError(
            "the judge's URL holds a name or password: take it out, and give the key by the environment"
        )
    if name.startswith("hf/") and name != "hf/local":  # transformers would ask the Hub for half a minute
        find_model(name.removeprefix("hf/"), "the judge")
    try:
        return get_model(name, base_url=url, memoize=False)
    except (PrerequisiteError, ValueError, LookupError, OSError) as error:
        words = re.sub(r"\[/?\w[^\]]*\]", "", str(error))
        raise SettingsError(f"judge {name}: {redact(' '.join(words.split()))}") from error
    except ImportError as error:
        raise MissingDependencyError(f"judge {name}: {redact(' '.join(str(error).split()))}") from error
