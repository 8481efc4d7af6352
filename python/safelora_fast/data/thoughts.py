"""Separating a reasoning model's answer from its thoughts, by the tags around them."""

from __future__ import annotations

import re

_NAME = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning)"
_OPEN = (
    rf"<\s*{_NAME}\s*>",  # most models
    r"\[THINK(?:ING)?\]",  # Mistral
    r"◁think▷",  # Kimi
    rf"<\|(?:begin_of_|start_)?{_NAME}(?:_start|_begin)?\|>",  # Sky-T1, Cohere
    r"<\|inner_prefix\|>",  # Apertus
    r"<\|channel>thought",  # Gemma 4
    r"<unused94>thought",  # MedGemma
    r"\A\s*Here(?:'s| is) my thought process:",  # Granite
    r"\A\s*Here are my reasoning steps:",  # Apriel
)
_CLOSE = (
    rf"<\s*/\s*{_NAME}\s*>",
    r"\[/THINK(?:ING)?\]",
    r"◁/think▷",
    rf"<\|(?:end_of_|end_|/){_NAME}\|>|<\|{_NAME}_end\|>",
    r"<\|inner_suffix\|>",
    r"<channel\|>",
    r"<unused95>",
    r"\[BEGIN FINAL RESPONSE\]",
)
_WORDS = r"Here(?:'s| is) my response:"  # Granite's; it closes thoughts only after an opening tag
_TAG = re.compile(rf"(?P<open>{'|'.join(_OPEN)})|(?P<close>{'|'.join(_CLOSE)})|(?P<words>{_WORDS})", re.IGNORECASE)
_OPENED = re.compile(rf"(?:{'|'.join(_OPEN)})\s*\Z", re.IGNORECASE)
_CHANNEL = "<|channel|>"  # gpt-oss: the answer is in the channel "final"
_FINAL = re.compile(r"\s*final\b")
_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>")
_CHANNEL_TOKENS = {_CHANNEL, "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>"}


def answer_after_thoughts(text: str) -> str | None:
    """Return a model's text without its thoughts: unchanged if it has none, None if they do not end."""
    if _CHANNEL in text:
        return _last_final(text)
    said, start, inside, found = "", 0, False, False
    end = len(text.rstrip())
    for tag in _TAG.finditer(text):
        if tag["open"]:
            said += "" if inside else text[start : tag.start()]
            inside = True
        elif inside or (tag["close"] and tag.end() < end):  # no opening tag: it was in the prompt
            said = said if inside else ""
            inside = False
        else:
            continue
        start, found = tag.end(), True
    if inside:
        return None
    return (said + text[start:]).strip() if found else text


def _last_final(text: str) -> str | None:
    """Return the text of the last "final" channel, in linear time."""
    for part in reversed(text.split(_CHANNEL)[1:]):
        name, message, said = part.partition("<|message|>")
        if message and _FINAL.match(name):
            for end in _ENDS:
                said = said.partition(end)[0]
            return said.strip()
    return None


def opening_tag(prompt: str) -> str | None:
    """Return the tag at a prompt's end that opens the thoughts for the model, or None."""
    match = _OPENED.search(prompt)
    return None if match is None else match[0].strip()


def is_tag(token: str) -> bool:
    """Return whether a special token is one of the tags that :func:`answer_after_thoughts` reads."""
    return token in _CHANNEL_TOKENS or _TAG.fullmatch(token) is not None
