"""Judges by their Inspect names, and whether they answer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from safelora_fast.checkpoints.resolver import find_model
from safelora_fast.errors import MissingDependencyError, SettingsError, how_to_install
from safelora_fast.judging.redact import NAMES, causes, redact

if TYPE_CHECKING:
    from inspect_ai.model import Model

    from safelora_fast.judging.verdicts import Rating

LOOPBACK = {"localhost", "127.0.0.1", "::1", "0.0.0.0"}  # noqa: S104 - as an address to ask, this machine
NO_KEY = "none"
HERE = {"hf", "mockllm", "none", "nnterp", "transformer_lens"}  # providers whose models run in this process
PAYMENT_REQUIRED = 402
QUOTA = "insufficient_quota"


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
    """A model as Inspect names it. Its credential comes from the environment, as its provider says; on this machine it needs none.

    Args:
        name: provider/model, e.g. openai-api/local/my-model, vllm/…, hf/….
        url: of an endpoint, in the place of the provider's own.

    Raises:
        CheckpointError: there is no such model to load for a judge hf/….
        SettingsError: Inspect cannot make it; or the URL is none, or holds a credential.
        MissingDependencyError: its provider needs a package that is not installed.
    """
    from inspect_ai._util.error import PrerequisiteError
    from inspect_ai.model import get_model

    host = None if url is None else _host(url, "the judge's URL")
    if name.startswith("hf/") and name != "hf/local":  # transformers would ask the Hub for half a minute
        find_model(name.removeprefix("hf/"), "the judge")
    try:
        try:
            model = get_model(name, base_url=url, memoize=False)
        except PrerequisiteError:
            if host not in LOOPBACK:
                raise
            model = get_model(name, base_url=url, api_key=NO_KEY, memoize=False)
    except ImportError as error:
        raise MissingDependencyError(f"judge {name}: {_words(error)}") from error
    except Exception as error:  # whatever providers and their clients raise
        odd = (
            type(error).__name__ == "InvalidURL"
        )  # it comes from the environment, and its words may be those of a password
        words = "the URL of its endpoint is no address" if odd else _words(error, marked=True)
        raise SettingsError(f"judge {name}: {words}") from None
    given = getattr(model.api, "base_url", None)
    if isinstance(given, str):
        _host(given, "the judge's URL, which comes from the environment,")
    return model


def check_judge(name: str, url: str | None, reply_tokens: int) -> str | None:
    """Ask a judge one question, before anything is made for it; returns what is odd about its reply, but may pass.

    Args:
        name: see :func:`find_judge`.
        url: see :func:`find_judge`.
        reply_tokens: the most tokens of a reply.

    Raises:
        SettingsError: there is nobody at its address, it refuses the key or the model's name, or it takes no such request.
    """
    import anyio

    from safelora_fast.judging.judge import Judge
    from safelora_fast.judging.judge_prompts import FIRST_ANSWER, FIRST_QUESTION, judge_prompt
    from safelora_fast.judging.retry import Budget, Endpoint, UnreachableError, is_nobody

    if name.partition("/")[0] in HERE:
        return None
    model = find_judge(name, url)
    endpoint = Endpoint(model, Budget(tries=2, wait=1, timeout=120, total=150), quiet=True)
    judge = Judge(model, reply_tokens=reply_tokens, endpoint=endpoint)

    async def ask() -> Rating:
        try:
            prompt = judge_prompt("coherence", FIRST_QUESTION, FIRST_ANSWER)
            return judge.read(*await endpoint.ask(prompt, judge.config(0)))
        finally:
            await model.api.aclose()

    try:
        rating = anyio.run(ask)
    except Exception as error:  # whatever a provider raises
        cause = error.__cause__ if isinstance(error, UnreachableError) and error.__cause__ else error
        status, said = getattr(cause, "status_code", None), _words(cause)
        where = getattr(model.api, "base_url", None) or "its provider's address"
        if is_nobody(cause):
            hopeless = f"nobody answers at {where} ({_root(cause)}): start the server, or correct --judge-url"
        elif status in {401, 403}:
            keys = " or ".join(getattr(model.api, "api_key_vars", None) or ["the environment"])
            hopeless = f"the endpoint refuses the key that it is given ({status}): {said}; the key comes from {keys}"
        elif QUOTA in said or status == PAYMENT_REQUIRED:
            hopeless = f"the account has no quota left: {said}"
        elif status is not None and 400 <= status < 500 and not isinstance(error, UnreachableError):
            hopeless = f"{where} refuses a plain question ({status}): {said}; correct the model's name, or --judge-url"
        else:
            return f"judge {name} does not answer yet ({type(cause).__name__}: {said}); it is asked again later"
        raise SettingsError(f"judge {name}: {hopeless}") from None
    return (
        None
        if rating.value is not None
        else f"judge {name}, asked a first question: {rating.reason}, {rating.detail!r}"
    )


def _host(url: str, what: str) -> str:
    """The host of a URL that holds no credential. The URL itself is in no message: it may hold one in an odd place.

    Raises:
        SettingsError: it is no URL, or holds a name, a password or a key.
    """
    if "@" in url:
        raise SettingsError(f"{what} holds a name or password: take it out, and give the key by the environment")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in {"http", "https"} or re.search(r"[\s\x00-\x1f]", url):
        raise SettingsError(f"{what} is no address such as http://localhost:8000/v1")
    if any(name.upper().replace("-", "_").endswith((*NAMES, "SIG")) for name, _ in parse_qsl(parts.query)):
        raise SettingsError(f"{what} holds a key: take it out, and give the key by the environment")
    return host


def _words(error: BaseException, *, marked: bool = False) -> str:
    """What an exception says, in one line, without credentials and, where it is `marked`, without Inspect's marks."""
    words = " ".join(str(error)[:2000].split())
    return redact(re.sub(r"\[/?\w[^\]]{0,100}\]", "", words) if marked else words)[:300].rstrip(". ")


def _root(error: BaseException) -> str:
    """What the innermost cause says: that of the system, or of a redirect."""
    return _words([one for one in causes(error) if str(one)][-1])
