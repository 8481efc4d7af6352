"""One-line messages for exceptions of transformers, PEFT, torch and the Hub, with advice for common ones."""

from __future__ import annotations

import re

LONGEST = 400
SIZE = re.compile(
    r"size mismatch for (?P<name>\S+): copying a param with shape torch\.Size\((?P<file>\[[\d, ]*\])\) from checkpoint, "
    r"the shape in current model is torch\.Size\((?P<model>\[[\d, ]*\])\)"
)
MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory|not enough memory", re.IGNORECASE)
NAMES_ONLY = (KeyError, AttributeError, IndexError, NotImplementedError)  # their text is usually only a name
# Common errors: class names of an exception or its causes, a pattern that has been stable for years, and the advice.
USUAL = (
    (
        {"GatedRepoError"},
        r"gated repo",
        "the repository is gated: accept its terms at {page}, and log in with `hf auth login` or HF_TOKEN",
    ),
    (
        {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectTimeout", "ConnectError"},
        r"couldn't connect to|outgoing traffic has been disabled",
        "it is neither on this machine nor in the Hub's cache, and the Hub cannot be reached: check its name and the network, or "
        "HF_HUB_OFFLINE",
    ),
    (
        {"RepositoryNotFoundError"},
        r"is not a valid model identifier|Repository Not Found",
        "there is no such repository on the Hub, or it is private: check its name, or log in with `hf auth login` or HF_TOKEN",
    ),
    (
        (),
        r"from one of: .*serialization file|Can't load tokenizer for",
        "there is no tokenizer that can be read: put tokenizer.json and tokenizer_config.json there, or install sentencepiece and "
        "tiktoken where it is of an older format",
    ),
    (
        (),
        r"trust_remote_code",
        "it comes with Python code of its own, which is not run unasked: read it, and pass --trust-remote-code (trust_remote_code: "
        "true in a recipe) where you trust it",
    ),
    (
        (),
        r"does not recognize this architecture",
        "{first}: a newer transformers may know it (pip install -U transformers)",
    ),
    (
        (),
        r"toggled on|attn_implementation.* is not supported|does not support .*[Aa]ttention",
        "{first}: choose another attention (sdpa or eager), or install what it needs",
    ),
)


def explained(error: BaseException) -> str:
    """Return an exception in one line: cause and advice for a common one, else the start of its own text."""
    text = " ".join(str(error).split())
    if sizes := list(SIZE.finditer(text)):
        first = sizes[0]
        more = f" (and {len(sizes) - 1} more)" if len(sizes) > 1 else ""
        return f"{first['name']} is {first['file']} in the file, but {first['model']} in the model{more}"
    kinds = {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    if "OutOfMemoryError" in kinds or isinstance(error, MemoryError) or MEMORY.search(text):
        return f"out of memory ({shortened(text)}): choose bfloat16, a smaller batch or another device"
    for classes, words, advice in USUAL:
        if kinds & set(classes) or re.search(words, text):
            page = re.search(r"https://huggingface\.co/[\w./-]*[\w-]", text)
            return advice.format(first=_first_sentence(text), page=page[0] if page else "its page on the Hub")
    if isinstance(error, NAMES_ONLY) or not text:
        return f"{type(error).__name__}: {shortened(text)}" if text else type(error).__name__
    return shortened(text)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its class name if it has none."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def shortened(text: str) -> str:
    """Return a text, truncated between words if it is long."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rpartition(' ')[0]} …"


def _chain(error: BaseException) -> list[BaseException]:
    """Return an exception and its causes."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


def _first_sentence(text: str) -> str:
    return shortened(re.split(r"(?<=[a-z\"'`])\. ", text)[0].rstrip("."))
