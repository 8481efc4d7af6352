"""Script: score completions under SmolLM2-135M and two adapters, to measure time or memory.

`selection_scores.py time FOLDER ROUNDS` prints the seconds of every provider in each round, and its largest error.
`selection_scores.py memory FOLDER PROVIDER` prints one provider's memory before and at its peak. Both print JSON. It
runs in a separate process so that the allocator can be set.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import linear
from transformers import AutoTokenizer

from processes import peak_memory
from safelora_fast.data.rows import Row
from safelora_fast.data.tokens import IGNORED_LABEL, Encoder, Example
from safelora_fast.demo.packaged_model import load
from safelora_fast.demo.text import rows
from safelora_fast.scoring import batches_by_length
from safelora_fast.scoring.label_likelihoods import CHUNK_ELEMENTS
from safelora_fast.scoring.prefix import shared_prefix
from safelora_fast.selection.perplexity import Perplexities
from safelora_fast.selection.scan import TOKENS_PER_BATCH
from safelora_fast.selection.select import gap

if TYPE_CHECKING:
    from collections.abc import Callable

RANK, ADAPTERS = 16, 2
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TURNS = (1, 1, 1, 2, 2, 4, 6)
COUNT, WARM_UP, LONGEST = 42, 4, 8
STRAIGHTFORWARD = "straightforward, float32"


def adapters(folder: Path) -> dict[str, Path]:
    """Return adapters with random weights, made once."""
    made = {f"adapter{number}": folder.parent / f"selection-adapter{number}" for number in range(ADAPTERS)}
    for number, path in enumerate(made.values()):
        if (path / "adapter_config.json").exists():
            continue
        options = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        model = get_peft_model(load(folder), options)
        generator = torch.Generator().manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.01 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(path)
    return made


def examples(folder: Path) -> list[Example]:
    """Return conversations of one to six turns, from the demo's general questions."""
    encoder = Encoder(AutoTokenizer.from_pretrained(folder))
    texts = rows("general") * 4
    made, used = [], 0
    for number in range(COUNT):
        turns = []
        for row in texts[used : used + TURNS[number % len(TURNS)]]:
            turns += [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]
        used += len(turns) // 2
        made.append(encoder.example(Row(str(number), [], turns)))
    return made


class Scores:
    """One set of examples, and several ways to score it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.adapters = adapters(folder)
        self.examples = examples(folder)
        self._ours: dict[torch.dtype, Perplexities] = {}
        self._plain: Any = None

    def straightforward(self, dtype: torch.dtype = torch.float32) -> np.ndarray:
        """One model at a time, one example at a time, all logits in float32."""
        from peft import PeftModel

        if self._plain is None:
            (first, path), *others = self.adapters.items()
            self._plain = PeftModel.from_pretrained(load(self.folder).to(dtype), path, adapter_name=first).eval()
            for name, other in others:
                self._plain.load_adapter(other, adapter_name=name)
        model, columns = self._plain, []
        with model.disable_adapter():
            columns.append([self._row(model, example) for example in self.examples])
        for name in self.adapters:
            model.set_adapter(name)
            columns.append([self._row(model, example) for example in self.examples])
        return np.array(columns).T

    @staticmethod
    @torch.no_grad()
    def _row(model: Any, example: Example) -> float:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, torch.tensor(example.labels[1:])).item()

    def ours(self, dtype: torch.dtype) -> np.ndarray:
        if dtype not in self._ours:
            self._ours[dtype] = Perplexities(
                load(self.folder).to(dtype).eval(), self.adapters, tokens_per_batch=TOKENS_PER_BATCH["cpu"]
            )
        scored = np.empty((len(self.examples), 1 + ADAPTERS))
        for batch in batches_by_length([len(example.ids) for example in self.examples], TOKENS_PER_BATCH["cpu"]):
            some = [self.examples[index] for index in batch]
            scored[batch] = self._ours[dtype].of(some, [example.place for example in some])
        return scored

    def providers(self) -> dict[str, Callable[[], np.ndarray]]:
        return {
            STRAIGHTFORWARD: self.straightforward,
            "ours, float32": partial(self.ours, torch.float32),
            "ours, bfloat16": partial(self.ours, torch.bfloat16),
        }


class Products:
    """Only the matrix products of our batches: a lower bound on scoring.

    Excludes adapters, attention, and the extra work for padding and shared prefixes.
    """

    def __init__(self, folder: Path, examples: list[Example], dtype: torch.dtype) -> None:
        config = load(folder).config
        width, inner = config.hidden_size, config.intermediate_size
        keys = width // config.num_attention_heads * config.num_key_value_heads
        block = [(width, width), (keys, width), (keys, width), (width, width), *2 * [(inner, width)], (width, inner)]
        self.weights = [torch.randn(*shape, dtype=dtype) for shape in block * config.num_hidden_layers]
        self.head = torch.randn(config.vocab_size, width, dtype=dtype)
        self.batches = []
        for batch in batches_by_length([len(example.ids) for example in examples], TOKENS_PER_BATCH["cpu"]):
            some = [examples[index] for index in batch]
            tokens = sum(len(example.ids) for example in some) - len(some) * shared_prefix(some)
            answers = sum(label != IGNORED_LABEL for example in some for label in example.labels)
            inputs = {size: torch.randn(tokens, size, dtype=dtype) for size in (width, inner)}
            self.batches.append((inputs, torch.randn(answers, width, dtype=dtype)))

    @torch.no_grad()
    def __call__(self) -> None:
        for inputs, answers in self.batches * (1 + ADAPTERS):
            for weight in self.weights:
                linear(inputs[weight.shape[1]], weight)
            for chunk in answers.split(CHUNK_ELEMENTS["cpu"] // len(self.head)):
                linear(chunk, self.head)


def timed(scores: Scores, rounds: int) -> dict[str, Any]:
    """Alternate between the providers in each round, after a few examples as warm-up."""
    providers = scores.providers()
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    found = {}
    everything, scores.examples = scores.examples, scores.examples[:WARM_UP]
    for work in providers.values():
        work()
    scores.examples = everything
    limits = {
        f"limit: the products alone, {name}": Products(scores.folder, everything, getattr(torch, name))
        for name in ("float32", "bfloat16")
    }
    seconds.update({name: [] for name in limits})
    for _ in range(rounds):
        for name, work in providers.items():
            start = time.perf_counter()
            found[name] = gap(work(), 1.0)
            seconds[name].append(time.perf_counter() - start)
        for name, products in limits.items():
            start = time.perf_counter()
            products()
            seconds[name].append(time.perf_counter() - start)
    off = {name: float(np.abs(values - found[STRAIGHTFORWARD]).max()) for name, values in found.items()}
    lengths = [len(example.ids) for example in scores.examples]
    return {"seconds": seconds, "off": off, "rows": len(lengths), "tokens": sum(lengths), "longest": max(lengths)}


def peak(scores: Scores, provider: str) -> dict[str, float]:
    """Return resident megabytes before scoring the longest examples, after the first time, and at the peak."""
    scores.examples = sorted(scores.examples, key=lambda example: len(example.ids))[-LONGEST:]
    work = scores.providers()[provider]
    return peak_memory(work)


if __name__ == "__main__":
    what, folder, argument = sys.argv[1:]
    scores = Scores(Path(folder))
    print(json.dumps(timed(scores, int(argument)) if what == "time" else peak(scores, argument)))
