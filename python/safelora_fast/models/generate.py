"""Answers of a model on this machine: in batches, repeatable by seed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Makes the largest score a sample: Gumbel noise on the logits, of one generator for each row.

    What a row is sampled to depends on its seed alone, whichever rows share its batch (but for the last digits of logits).

    Args:
        seeds: one for each row.
        temperature: divides the logits.
        device: of the logits.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary] with noise."""
        del input_ids
        scores = scores.float() / self._temperature
        for row, generator in zip(scores, self._generators, strict=True):
            row.sub_(torch.empty_like(row).exponential_(generator=generator).log_())
        return scores


class NanWatch(LogitsProcessor):  # type: ignore[misc]
    """Notices logits that are NaN, of which the likeliest token would be token 0; scores stay as they are."""

    def __init__(self) -> None:
        self._seen: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary]; what is noticed stays on their device."""
        del input_ids
        found = scores.isnan().any()
        self._seen = found if self._seen is None else self._seen | found
        return scores

    def check(self) -> None:
        """Refuse what was written from such logits.

        Raises:
            EvaluationError: there were some.
        """
        if self._seen is not None and bool(self._seen):
            raise EvaluationError(NAN_LOGITS)


PROMPT_END = 16  # tokens of a prompt's end in which a tag that opens thoughts would stand
NAN_LOGITS = "the model's logits are NaN: its training diverged, or its dtype overflows"


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[Message]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 16,
    known: Container[int] = (),
) -> Iterator[dict[int, str]]:
    """Answers by the number of their conversation, a batch at a time.

    The model's distribution is sampled as it is: penalties and cuts of its generation settings are left out. An answer ends
    where :func:`~safelora_fast.data.chat.answer_ends` says. Thoughts stay in it, with the tags around them.

    Args:
        model: a causal language model, with a PEFT adapter or without.
        tokenizer: its tokenizer, whose chat template is used.
        conversations: turns that end with the user's.
        max_tokens: the most tokens of an answer.
        temperature: 0 takes the likeliest token.
        seeds: one for each conversation; their numbers by default.
        batch_size: conversations at a time.
        known: numbers of conversations whose answers are known: a batch of these alone is left out. Rounding depends on what is
            in a batch, so to get the bytes of an unbroken run give all its conversations.

    Raises:
        DataError: there is no chat template, or it refuses a conversation.
        SettingsError: a number is out of range, or a batch does not fit into memory.
        EvaluationError: the model's logits are NaN.
    """
    if max_tokens < 1 or batch_size < 1 or temperature < 0:
        raise SettingsError("max_tokens and batch_size must be at least 1, and temperature at least 0")
    prompts = [_prompt(tokenizer, number, turns) for number, turns in enumerate(conversations)]
    device = model.get_input_embeddings().weight.device
    ends = answer_ends(model, tokenizer)
    settings = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), number))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        if all(number in known for number in numbers):
            continue
        ids, mask = _padded([prompts[number] for number in numbers], tokenizer.pad_token_id or 0)
        watch = NanWatch()
        processors = LogitsProcessorList([watch])
        if temperature > 0:
            chosen = [number if seeds is None else seeds[number] for number in numbers]
            processors.append(SeededSampling(chosen, temperature, device))
        try:
            with torch.no_grad(), evaluation_mode(model), generation_settings(model, settings):
                output = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=settings,
                    logits_processor=processors,
                    use_cache=True,
                )
        except torch.OutOfMemoryError as error:
            raise SettingsError(f"out of memory with {len(numbers)} answers at a time: lower the batch size") from error
        watch.check()
        rows = output[:, ids.shape[1] :].tolist()
        yield {n: _text(tokenizer, prompts[n], row, ends) for n, row in zip(numbers, rows, strict=True)}


@contextmanager
def generation_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Put settings in the place of the model's own, from which whatever is left open would be taken.

    PEFT's wrapper for causal language models copies its own settings into the model inside, and other wrappers do not: both
    are replaced, and both get theirs back.
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
                del part.generation_config  # a wrapper that shows that of the model inside
            else:
                part.generation_config = own


def _prompt(tokenizer: PreTrainedTokenizerBase, number: int, turns: list[Message]) -> list[int]:
    if not has_template(tokenizer):
        raise DataError("the tokenizer has no chat template: give one with --chat-template")
    return chat_of(tokenizer).prompt(turns, f"conversation {number + 1}")


def _text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: list[int], ends: Sequence[int]) -> str:
    """An answer's words: without special tokens, but for the tags of thoughts, that of the prompt included."""
    until = next((place for place, token in enumerate(answer) if token in ends), len(answer))
    answer = answer[:until]
    names = {token: str(tokenizer.decode([token])) for token in set(answer)}
    tags = {t for t, name in names.items() if is_tag(name) and not tokenizer.decode([t], skip_special_tokens=True)}
    parts, start = [], 0
    for place, token in enumerate(answer):
        if token in tags:
            parts += [tokenizer.decode(answer[start:place], skip_special_tokens=True), names[token]]
            start = place + 1
    parts.append(tokenizer.decode(answer[start:], skip_special_tokens=True))
    opened = opening_tag(str(tokenizer.decode(prompt[-PROMPT_END:])))
    return f"{opened or ''}{''.join(parts)}"


def _padded(prompts: Sequence[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens padded on the left, and their mask."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
