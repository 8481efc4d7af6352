"""Which Triton kernels a training run asks for: none that its first steps, before a CUDA graph is captured, did not.

A driver for a GPU that is not there keeps the key of every compilation and skips it, so nothing is computed.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from safelora_fast.ops import cuda_runtime, feature_distance, linear_kl, linear_kl_cross_entropy
from safelora_fast.ops.base import served_by
from safelora_fast.ops.linear_kl import chunks
from safelora_fast.ops.triton_runtime import interpreted

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing")


@pytest.fixture
def asked(monkeypatch):
    """Keys of the kernels that have been asked for."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import jit

    keys: set[tuple[str, str]] = set()

    def instead_of_compiling(*, key, fn, **_):
        keys.add((fn.name, key))
        return True

    target = GPUTarget("cuda", 90, 32)
    active = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: target
    )
    monkeypatch.setattr(jit, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", instead_of_compiling)
    with served_by("triton"):
        yield keys


@pytest.mark.parametrize("vocabulary", [48, 50257])
def test_losses_in_a_graph_and_of_any_number_of_tokens(asked, monkeypatch, vocabulary):
    monkeypatch.setitem(chunks.ROW_MULTIPLE, "cpu", chunks.ROW_MULTIPLE["other"])
    monkeypatch.setitem(chunks.CHUNK_ELEMENTS, "cpu", 16 * vocabulary)
    head = torch.randn(vocabulary, 16, dtype=torch.bfloat16)

    def losses(tokens, count):
        hidden = torch.randn(1, tokens, 16, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.arange(tokens)[None] < count
        labels = torch.where(mask, 3, -100)
        linear_kl(hidden, hidden.detach(), head, mask)
        linear_kl_cross_entropy(hidden, hidden.detach(), head, mask, labels, kl_weight=1.0, cross_entropy_weight=1.0)

    losses(32, 7)  # the warm-up
    known = set(asked)
    assert len(known) == 2
    for tokens, count in [(32, 1), (32, 17), (33, 33), (16, 16), (64, 3)]:
        losses(tokens, count)
    monkeypatch.setattr(cuda_runtime, "is_captured", lambda _: True)
    losses(32, 7)
    assert asked == known


@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_distances_of_any_batch(asked, normalize, packed):
    def distance(rows, tokens):
        features = [torch.randn(rows, tokens, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
        references = [torch.randn(rows, tokens, 64, dtype=torch.bfloat16) for _ in range(2)]
        mask = torch.ones(rows, tokens, dtype=torch.bool)
        segments = torch.zeros(rows, tokens, dtype=torch.int64) if packed else None
        feature_distance(features, references, mask, normalize, segments).backward()

    distance(2, 100)
    known = set(asked)
    assert len(known) >= 3
    for shape in [(1, 100), (16, 1), (3, 17), (4, 1024), (1, 1), (2, 2048)]:
        distance(*shape)
    assert asked == known
