"""Feature distance compared with the memory floor and eager torch, and its share of a training step.

States must have left the caches before they are compared. Calls therefore rotate through many sets of tensors, and each
call takes the least recently used set. Floors are loops that read two tensors, or read two and write one, with as many
threads. All measurements alternate within one run, because memory bandwidth drifts.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from allocator import reuse_memory
from safelora_fast import _core
from safelora_fast.ops.base import served_by
from safelora_fast.ops.feature_distance import feature_distance
from safelora_fast.ops.feature_distance.torch_impl import View, view_of

if TYPE_CHECKING:
    from collections.abc import Callable

TOKENS, HIDDEN = 128, 576
COLD_BYTES = 1 << 29
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def plain_distance(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The definition in torch, in float32 with autograd; every token counts."""
    x, y = features.float().flatten(1), reference.float().flatten(1)
    x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    return (x - y).square().sum(1).mean()


class States(NamedTuple):
    """One set of tensors, [batch, tokens, hidden], and the other arguments of the kernel."""

    features: torch.Tensor
    reference: torch.Tensor
    gradient: torch.Tensor
    factors: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def make(cls, batch: int, dtype: torch.dtype, seed: int) -> States:
        generator = torch.Generator().manual_seed(seed)
        reference = torch.randn(batch, TOKENS, HIDDEN, generator=generator)
        features = (reference + 0.1 * torch.randn(reference.shape, generator=generator)).to(dtype)
        mask = torch.ones(batch, TOKENS, dtype=torch.bool)
        factors = torch.zeros(1, batch, TOKENS, 2, dtype=torch.float64)
        return cls(features.requires_grad_(), reference.to(dtype), torch.zeros_like(features), factors, mask)

    def region(self, name: str) -> tuple[int, int]:
        tensor = getattr(self, name)
        return tensor.data_ptr(), tensor.nbytes

    def specs(self) -> tuple[list[View], list[View]]:
        return [view_of(self.features)], [view_of(self.reference)]


Figures = dict[str, float]


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def floors(states: States, threads: int) -> Figures:
    read = [states.region("features"), states.region("reference")]
    written = states.region("gradient")
    return {
        "read": _core.read_seconds(read, threads),
        "update": _core.update_seconds(read, written, threads),
        "update_streamed": _core.update_seconds(read, written, threads, stream=True),
    }


def kernel_forward(states: States, threads: int) -> Figures:
    features, reference = states.specs()
    mask, factors = (states.mask.data_ptr(), states.mask.stride()), states.factors.data_ptr()
    return {
        "kernel_forward": timed(
            lambda: _core.feature_distance(features, reference, mask, None, factors, threads=threads)
        )
    }


def kernel_backward(states: States, threads: int) -> Figures:
    features, reference = states.specs()
    factors, output = [states.factors.data_ptr()], [states.gradient.data_ptr()]
    return {
        "kernel_backward": timed(
            lambda: _core.feature_distance_gradient(features, reference, factors, output, 1.0, threads=threads)
        )
    }


def differentiated(name: str, distance: Callable[[], torch.Tensor], states: States) -> Figures:
    """Forward and backward of an operation. As in practice, the backward reads what the forward has just read."""
    start = time.perf_counter()
    value = distance()
    middle = time.perf_counter()
    torch.autograd.grad(value, states.features)
    return {f"{name}_forward": middle - start, f"{name}_backward": time.perf_counter() - middle}


def operation(states: States, _: int) -> Figures:
    distance = lambda: feature_distance([states.features], [states.reference], states.mask)  # noqa: E731
    return differentiated("operation", distance, states)


def plain(states: States, _: int) -> Figures:
    return differentiated("plain", lambda: plain_distance(states.features, states.reference), states)


def by_rows(states: States, _: int) -> Figures:
    distance = lambda: feature_distance([states.features], [states.reference], states.mask)  # noqa: E731
    with served_by("eager"):
        return differentiated("by_rows", distance, states)


MEASURES = [floors, kernel_forward, kernel_backward, operation, plain, by_rows]


def measure(sets: list[States], rounds: int, threads: int) -> Figures:
    """Medians of all measurements, which alternate; each takes a set that no other used recently."""
    figures: dict[str, list[float]] = {}
    apart = max(len(sets) // len(MEASURES), 1)
    for step in range((rounds + 1) * len(sets)):
        for number, take in enumerate(MEASURES):
            for name, seconds in take(sets[(step + number * apart) % len(sets)], threads).items():
                if step >= len(sets):
                    figures.setdefault(name, []).append(seconds)
    return {name: statistics.median(seconds) for name, seconds in figures.items()}


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("megabytes", [1, 4, 10, 24, 64])
def test_beside_the_memory_floor(
    benchmark: Callable[..., None], add_row: Callable[..., None], megabytes: int, dtype: str
) -> None:
    allocator = reuse_memory()
    threads = _core.default_threads()
    batch = max(round(megabytes * 1e6 / (TOKENS * HIDDEN * DTYPES[dtype].itemsize)), 1)
    size = batch * TOKENS * HIDDEN * DTYPES[dtype].itemsize
    count = max(COLD_BYTES // (3 * size), 3)
    sets = [States.make(batch, DTYPES[dtype], seed) for seed in range(count)]
    result = benchmark.pedantic(measure, args=(sets, max(60 // count, 2), threads), rounds=1)
    read, update = result["read"], min(result["update"], result["update_streamed"])
    forward, backward, operation_forward, operation_backward = (
        result[f"{name}_{way}"] for name in ("kernel", "operation") for way in ("forward", "backward")
    )
    whole = operation_forward + operation_backward
    add_row(
        dtype=dtype,
        megabytes=size / 1e6,
        read_gb_s=2e-9 * size / read,
        update_gb_s=3e-9 * size / update,
        forward_ms=1e3 * forward,
        backward_ms=1e3 * backward,
        forward_share=read / forward,
        backward_share=update / backward,
        operation_forward_ms=1e3 * operation_forward,
        operation_backward_ms=1e3 * operation_backward,
        operation_forward_share=read / operation_forward,
        operation_backward_share=update / operation_backward,
        plain_ms=1e3 * (result["plain_forward"] + result["plain_backward"]),
        times_plain=(result["plain_forward"] + result["plain_backward"]) / whole,
        by_rows_ms=1e3 * (result["by_rows_forward"] + result["by_rows_backward"]),
        times_by_rows=(result["by_rows_forward"] + result["by_rows_backward"]) / whole,
        threads=threads,
        allocator=allocator,
    )
    del sets
    gc.collect()


def test_share_of_a_training_step(benchmark: Callable[..., None], add_row: Callable[..., None]) -> None:
    """Steps of a 135M model with a LoRA adapter, with and without the distance to precomputed reference states."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    from safelora_fast import FeatureDistance
    from safelora_fast.data.spans import read_spans
    from safelora_fast.defenses.base import Observation
    from safelora_fast.models.anatomy import dissect
    from safelora_fast.models.capture import Capture, Tap

    allocator = reuse_memory()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(r=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    defense, anatomy = FeatureDistance(), dissect(model)
    tap = Tap(anatomy, defense.recorded_layers(anatomy))
    tap.attach()
    tokens = torch.randint(0, 49152, (4, 128))
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    spans = read_spans(batch)
    with torch.no_grad():
        reference = tap.begin()
        model(**batch)

    def step(defended: bool) -> tuple[float, Capture]:
        start = time.perf_counter()
        student = tap.begin()
        loss = model(**batch).loss
        if defended:
            loss = loss + defense.weight * defense.loss(Observation(anatomy, student, reference, spans)) / 4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start, student

    def alone(student: Capture) -> float:
        """The distance and its gradient with respect to the captured states, and adding it to another gradient."""
        blocks = {index: block.detach().requires_grad_() for index, block in student.layers.items()}
        others = [torch.zeros_like(block) for block in blocks.values()]
        start = time.perf_counter()
        value = defense.loss(Observation(anatomy, Capture(blocks), reference, spans)) / 4
        for other, gradient in zip(others, torch.autograd.grad(value, list(blocks.values())), strict=True):
            other.add_(gradient)
        return time.perf_counter() - start

    def run() -> tuple[float, float, float]:
        plain_seconds, differences, direct = [], [], []
        for _ in range(12):
            without, _ = step(defended=False)
            defended, student = step(defended=True)
            plain_seconds.append(without)
            differences.append(defended - without)
            direct.append(alone(student))
        return tuple(statistics.median(values[2:]) for values in (plain_seconds, differences, direct))

    plain_step, difference, direct = benchmark.pedantic(run, rounds=1)
    add_row(
        dtype="fp32",
        step_ms=1e3 * plain_step,
        distance_ms=1e3 * direct,
        share_of_step=direct / plain_step,
        share_by_difference=difference / plain_step,
        threads=_core.default_threads(),
        allocator=allocator,
    )
