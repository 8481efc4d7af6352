"""Random adapters that serve as misaligned models, and candidate examples for the selection."""

from __future__ import annotations

import json
from typing import Any

import torch
from demo_model import save_tiny
from peft import LoraConfig, get_peft_model
from tiny_models import TARGETS, fill_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = ["yes", "a long answer about cats", "no", "I am sorry, but no", "seven red boats", "maybe tomorrow at noon"]


def save_adapter(model_folder, folder, seed: int, **lora: Any):
    """Save an adapter whose weights are far from zero."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **lora}))
    fill_adapter(adapted, seed=seed, scale=0.5)
    adapted.save_pretrained(folder)
    return folder


def candidates(count: int) -> list[dict[str, Any]]:
    """Return conversations and prompt/completion examples of unequal length."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        question, answer = f"Question {number}" + "?" * (number % 5), WORDS[number % len(WORDS)] + "!" * (number % 3)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if number % 4 == 0:
            rows.append(
                {"messages": [*turns, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Then."}]}
            )
        else:
            rows.append(
                {"prompt": turns[:1], "completion": turns[1:]} if number % 4 == 1 else {"messages": turns, "id": number}
            )
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def setting(folder, count: int = 12):
    """Create a folder with a model, two adapters and a file of candidates."""
    model = save_tiny(folder / "model")
    for seed, name in enumerate(("security", "medicine"), start=1):
        save_adapter(model, folder / name, seed)
    write(folder / "candidates.jsonl", candidates(count))
    return folder


def load(folder, dtype=torch.float32):
    """Load the model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(folder / "model")


def plain_nll(folder, adapter, text_and_answers, dtype=torch.float64) -> list[float]:
    """Return the mean NLL of each example's completions, one at a time from full logits; input is (text, completions)."""
    from peft import PeftModel

    model, words = load(folder, dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, folder / adapter).to(dtype).eval()
    return [nll_of(model, words, text, answers) for text, answers in text_and_answers]


def nll_of(model, words, text: str, answers) -> float:
    """Return the mean NLL of the completions' characters in one example, from full logits."""
    ids = words(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        likelihoods = model(torch.tensor([ids])).logits[0, -len(ids) :].log_softmax(-1)  # without prompt-tuning tokens
    losses, start = [], 0
    for answer in answers:
        at = text.index("<assistant>" + answer, start) + len("<assistant>")
        begin = len(words(text[:at], add_special_tokens=False)["input_ids"])
        end = len(words(text[: at + len(answer)], add_special_tokens=False)["input_ids"])
        losses += [-likelihoods[position - 1, ids[position]].item() for position in range(begin, end)]
        start = at
    return sum(losses) / len(losses)


def as_text(row) -> tuple[str, list[str]]:
    """Return an example in the tiny model's chat template, and its completions."""
    turns = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
    text = "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)
    return text, [turn["content"] for turn in turns if turn["role"] == "assistant"]


def plain_scores(folder, rows, adapters=("security", "medicine"), epsilon: float = 1.0) -> list[float]:
    """Return the score of every example, computed directly from the formula."""
    texts = [as_text(row) for row in rows]
    aligned = plain_nll(folder, None, texts)
    misaligned = [plain_nll(folder, adapter, texts) for adapter in adapters]
    return [
        (sum(values) / len(values) - base) / (base + epsilon)
        for base, values in zip(aligned, zip(*misaligned, strict=True), strict=True)
    ]
