"""Finds a judge by its Inspect name, and checks that it answers."""

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

LOOPBACK = {"localhost", "127.0.0.1", "::1", "0.0.0.0"}  # noqa: S104 - for a client, 0.0.0.0 is this machine
NO_KEY = "none"
IN_PROCESS = {"hf", "mockllm", "none", "nnterp", "transformer_lens"}  # providers whose models run in this process
PAYMENT_REQUIRED = 402
QUOTA = "insufficient_quota"


def check_inspect() -> None:
    """Check that Inspect is installed.

    Raises:
        MissingDependencyError: it is not; the message says how to install it.
    """
    try:
        import inspect_ai  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"judging needs inspect-ai: {how_to_install('eval')}") from error


def find_judge(name: str, url: str | None = None) -> Model:
    """Return a model by its Inspect name.

    The key comes from the environment variable that the provider reads. An endpoint on this machine needs no key.

    Args:
        name: provider/model, e.g. openai-api/local/my-model, vllm/…, hf/….
        url: an endpoint that replaces the provider's default.

    Raises:
        CheckpointError: the model of a judge hf/… does not exist.
        SettingsError: Inspect cannot create the model, or the URL is malformed or holds a credential.
        MissingDependencyError: the provider needs a package that is not installed.
    """
    from inspect_ai._util.error import PrerequisiteError
    from inspect_ai.model import get_model

    host = None if url is None else _host(url, "the judge's URL")
    if name.startswith("hf/") and name != "hf/local":  # or transformers would query the Hub for half a minute
        find_model(name.removeprefix("hf/"), "the judge")
    try:
        try:
            model = get_model(name, base_url=url, memoize=False)
        except PrerequisiteError:
            if host not in LOOPBACK:
                raise
            model = get_model(name, base_url=url, api_key=NO_KEY, memoize=False)
    except ImportError as error:
        raise MissingDependencyError(f"judge {name}: {_one_line(error)}") from error
    except Exception as error:  # providers and their clients raise anything
        if type(error).__name__ == "InvalidURL":  # a URL from the environment; the message may show a password
            raise SettingsError(f"judge {name}: the URL of its endpoint is not an address") from None
        raise SettingsError(f"judge {name}: {_one_line(error, marked=True)}") from None
    given = getattr(model.api, "base_url", None)
    if isinstance(given, str):
        _host(given, "the judge's URL, which comes from the environment,")
    return model


def check_judge(name: str, url: str | None, reply_tokens: int) -> str | None:
    """Ask a judge one question before hours of work depend on it.

    Args:
        name: see :func:`find_judge`.
        url: see :func:`find_judge`.
        reply_tokens: maximum tokens of a reply.

    Returns:
        A warning if the problem may be temporary, None if there is no problem.

    Raises:
        SettingsError: nothing answers at the address, or the endpoint rejects the key, the model's name or every request.
    """
    import anyio

    from safelora_fast.judging.endpoint_guard import PageError, RedirectError
    from safelora_fast.judging.judge import Judge
    from safelora_fast.judging.judge_prompts import FIRST_ANSWER, FIRST_QUESTION, judge_prompt
    from safelora_fast.judging.retry import Budget, Endpoint, UnreachableError, is_nobody

    if name.partition("/")[0] in IN_PROCESS:
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
    except Exception as error:  # providers raise anything
        waited = isinstance(error, UnreachableError)
        cause = error.__cause__ or error if waited else error
        status, text = getattr(cause, "status_code", None), _one_line(cause)
        where = getattr(model.api, "base_url", None) or "its provider's address"
        if is_nobody(cause):
            root = _one_line([one for one in causes(cause) if str(one)][-1])
            problem = f"nobody answers at {where} ({root}): start the server, or correct --judge-url"
            if any(isinstance(one, PageError | RedirectError) for one in causes(cause)):
                problem = f"{where} is not the address of a chat model's API, because {root}: correct --judge-url"
        elif status in {401, 403}:
            keys = " or ".join(getattr(model.api, "api_key_vars", None) or ["the environment"])
            problem = f"the endpoint refuses the key that it is given ({status}): {text}; the key comes from {keys}"
        elif QUOTA in text or status == PAYMENT_REQUIRED:
            problem = f"the account has no quota left: {text}"
        elif status is not None and 400 <= status < 500 and not waited:
            problem = f"{where} refuses a plain question ({status}): {text}; correct the model's name, or --judge-url"
        else:
            return f"judge {name} does not answer yet ({type(cause).__name__}: {text}); it is asked again later"
        raise SettingsError(f"judge {name}: {problem}") from None
    if rating.value is not None:
        return None
    return f"judge {name}, asked a first question: {rating.reason}, {rating.detail!r}"


def _host(url: str, what: str) -> str:
    """Return the host of a URL. No message shows the URL, because any part of it may hold a credential.

    Raises:
        SettingsError: the URL is malformed, or holds a user name, a password or a key.
    """
    if "@" in url:
        raise SettingsError(f"{what} holds a name or password: take it out, and give the key by the environment")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in {"http", "https"} or re.search(r"[\s\x00-\x1f]", url):
        raise SettingsError(f"{what} is not an address such as http://localhost:8000/v1")
    if any(name.upper().replace("-", "_").endswith((*NAMES, "SIG")) for name, _ in parse_qsl(parts.query)):
        raise SettingsError(f"{what} holds a key: take it out, and give the key by the environment")
    return host


def _one_line(error: BaseException, *, marked: bool = False) -> str:
    """Return an exception's message in one line, without credentials and, with `marked`, without rich's markup."""
    text = " ".join(str(error)[:2000].split())
    return redact(re.sub(r"\[/?\w[^\]]{0,100}\]", "", text) if marked else text)[:300].rstrip(". ")
