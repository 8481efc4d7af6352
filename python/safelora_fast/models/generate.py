"""Generating completions with a local model, in batches and reproducibly by seed."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from safelora_fast.data.chat import answer_ends, chat_of, has_template
from safelora_fast.data.thoughts import is_tag, opening_tag
from safelora_fast.errors import DataError, EvaluationError, SettingsError
from safelora_fast.models.reference_pass import evaluation_mode

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from safelora_fast.data.rows import Message

PROMPT_END = 16  # tokens at a prompt's end that may contain an opening thought tag
NAN_LOGITS = "the model's logits are NaN: its training diverged, or its dtype overflows"


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Keeps one token per sequence: the one where the cumulative probability passes the sequence's next random number.

    A sample depends only on the sequence's own numbers, not on the rest of the batch (up to the last digits of the
    logits).

    Args:
        numbers: uniform in [0, 1), float64 [batch, new tokens].
        temperature: divides the logits; above 0.
        width: prompt length in tokens, padding included.
        top_p: only the most likely tokens whose probabilities sum to it are sampled; 1 for all.
    """

    def __init__(self, numbers: torch.Tensor, temperature: float, width: int, top_p: float = 1.0) -> None:
        self._numbers = numbers
        self._temperature = temperature
        self._width = width
        self._top_p = top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [batch, vocabulary]: 0 at the sampled token and -inf elsewhere."""
        step = input_ids.shape[1] - self._width
        likely = (scores.float() / self._temperature).softmax(dim=-1)
        if self._top_p < 1:
            ordered, places = likely.sort(dim=-1, descending=True, stable=True)
            outside = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered >= self._top_p
            likely = likely.masked_fill(outside.scatter(-1, places, outside), 0.0)
        cumulative = likely.cumsum(dim=-1, dtype=torch.float64)
        height = self._numbers[:, step : step + 1].to(cumulative) * cumulative[:, -1:]
        sampled = torch.searchsorted(cumulative, height, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, sampled, 0.0)


class NanWatch(LogitsProcessor):  # type: ignore[misc]
    """Detects NaN logits, which would otherwise select token 0 silently; scores are not changed."""

    def __init__(self) -> None:
        self._seen: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [batch, vocabulary] unchanged; the NaN flag stays on their device."""
        del input_ids
        found = scores.isnan().any()
        self._seen = found if self._seen is None else self._seen | found
        return scores

    def check(self) -> None:
        """Check that no logits were NaN.

        Raises:
            EvaluationError: some logits were NaN.
        """
        if self._seen is not None and bool(self._seen):
            raise EvaluationError(NAN_LOGITS)


@dataclass(frozen=True)
class Completion:
    """A completion: its text, and its number of tokens without the end token."""

    text: str
    tokens: int


def generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[Message]], **settings: Any
) -> Iterator[dict[int, str]]:
    """Like :func:`generate_completions`, but yield the texts of the completions."""
    for batch in generate_completions(model, tokenizer, conversations, **settings):
        yield {number: completion.text for number, completion in batch.items()}


def generate_completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[Message]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 16,
    known: Container[int] = (),
) -> Iterator[dict[int, Completion]]:
    """Yield completions by conversation index, one batch at a time.

    A completion ends at a token of :func:`~safelora_fast.data.chat.answer_ends`. It includes thoughts and their tags.

    Args:
        model: a causal language model, with or without a PEFT adapter.
        tokenizer: its tokenizer, whose chat template is used.
        conversations: lists of turns, each ending with a user turn.
        max_tokens: maximum number of tokens of a completion.
        temperature: 0 selects the most likely token.
        top_p: only the most likely tokens whose probabilities sum to it are sampled.
        seeds: one seed per conversation; by default the conversation's index.
        batch_size: conversations per batch.
        known: indices of conversations whose completions are known; a batch with only known ones is skipped. Rounding
            depends on the batch, so pass all conversations of a run to reproduce its bytes.

    Raises:
        DataError: there is no chat template, or it refuses a conversation.
        SettingsError: a number is out of range, or a batch does not fit in memory.
        EvaluationError: the model's logits are NaN.
    """
    if max_tokens < 1 or batch_size < 1 or temperature < 0:
        raise SettingsError("max_tokens and batch_size must be at least 1, and temperature at least 0")
    if not 0 < top_p <= 1:
        raise SettingsError(f"top_p is {top_p}, it must be above 0 and at most 1")
    if not has_template(tokenizer):
        raise DataError("the tokenizer has no chat template: give one with --chat-template")
    chat = chat_of(tokenizer)
    prompts = [chat.prompt(turns, f"conversation {number}") for number, turns in enumerate(conversations, start=1)]
    ends = answer_ends(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), number))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        if all(number in known for number in numbers):
            continue
        chosen = [number if seeds is None else seeds[number] for number in numbers]
        draws = np.stack([np.random.default_rng(seed).random(max_tokens) for seed in chosen])
        batch, padding, watch = [prompts[number] for number in numbers], tokenizer.pad_token_id or 0, NanWatch()
        try:
            with evaluation_mode(model):
                settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "ends": ends}
                completions = generate_tokens(model, batch, draws, padding=padding, watch=watch, **settings)
        except torch.OutOfMemoryError as error:
            raise SettingsError(
                f"out of memory with {len(numbers)} completions at a time: lower the batch size"
            ) from error
        watch.check()
        yield {
            number: Completion(_text(tokenizer, prompts[number], tokens), len(tokens))
            for number, tokens in zip(numbers, completions, strict=True)
        }


def generate_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    draws: np.ndarray,
    *,
    temperature: float,
    ends: Sequence[int],
    padding: int,
    watch: NanWatch | None = None,
    top_p: float = 1.0,
) -> list[tuple[int, ...]]:
    """Generate completions for one batch of prompts of any length.

    The model's own generation settings (penalties, top-k, top-p) do not apply.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids.
        draws: uniform numbers in [0, 1) [prompts, maximum new tokens].
        temperature: 0 selects the most likely token.
        ends: tokens that end a completion.
        padding: the padding token.
        watch: detects NaN logits; without it they are not detected.
        top_p: as for :func:`generate_completions`.

    Returns:
        The tokens of each completion, without the end token.
    """
    device = model.get_input_embeddings().weight.device
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    processors = LogitsProcessorList([] if watch is None else [watch])
    if temperature > 0:
        processors.append(SeededSampling(torch.from_numpy(draws).to(device), temperature, width, top_p))
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=draws.shape[1],
        eos_token_id=list(ends) or None,
        pad_token_id=padding,
        use_cache=True,
    )
    with torch.no_grad(), _generation_settings(model, settings):
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            logits_processor=processors,
        )
    return [_until_end(row, ends) for row in output[:, width:].tolist()]


@contextmanager
def _generation_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Temporarily replace the model's generation settings, because transformers takes unset options from them.

    PEFT's wrapper for causal language models copies its settings into the model inside; other wrappers do not. So the
    settings of both are replaced and restored.
    """
    parts = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    former = [vars(part).get("generation_config", ...) for part in parts]
    for part in parts:
        part.generation_config = settings
    try:
        yield
    finally:
        for part, own in zip(parts, former, strict=True):
            if own is ...:
                del part.generation_config  # the wrapper reads the settings of the model inside
            else:
                part.generation_config = own


def _until_end(tokens: list[int], ends: Sequence[int]) -> tuple[int, ...]:
    first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:first])


def _text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: Sequence[int]) -> str:
    """Decode a completion, keeping thought tags as the only special tokens.

    An opening tag at the prompt's end is prepended.
    """
    names = {token: str(tokenizer.decode([token])) for token in set(completion)}
    tags = {t for t, name in names.items() if is_tag(name) and not tokenizer.decode([t], skip_special_tokens=True)}
    parts, start = [], 0
    for place, token in enumerate(completion):
        if token in tags:
            parts += [tokenizer.decode(list(completion[start:place]), skip_special_tokens=True), names[token]]
            start = place + 1
    parts.append(tokenizer.decode(list(completion[start:]), skip_special_tokens=True))
    opened = opening_tag(str(tokenizer.decode(prompt[-PROMPT_END:])))
    return f"{opened or ''}{''.join(parts)}"
