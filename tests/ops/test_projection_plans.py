"""Plans of grouped launches: which stream they belong to, and how long they are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safelora_fast.ops import plans
from safelora_fast.ops.plans import KEPT, Plans, uploaded

DEVICE = torch.device("cuda", 0)  # never used: the fixture defines its streams


class Gpu:
    stream = "first"
    captured = False


@pytest.fixture
def gpu(monkeypatch):
    made = Gpu()
    monkeypatch.setattr(plans, "current_stream", lambda _: made.stream)
    monkeypatch.setattr(plans, "is_captured", lambda _: made.captured)
    return made


def test_a_plan_is_of_one_stream(gpu):
    kept = Plans()
    first = kept.find("name", DEVICE, object)
    gpu.stream = "second"
    second = kept.find("name", DEVICE, object)
    assert first is not second
    assert kept.find("name", DEVICE, object) is second
    gpu.stream = "first"
    assert kept.find("name", DEVICE, object) is first


def test_the_plans_used_last_are_kept(gpu):
    kept = Plans()
    first = kept.find(0, DEVICE, object)
    for name in range(1, KEPT):
        kept.find(name, DEVICE, object)
    assert kept.find(0, DEVICE, object) is first
    kept.find(KEPT, DEVICE, object)
    assert len(kept.recent) == KEPT
    assert ("first", 1) not in kept.recent
    assert kept.find(0, DEVICE, object) is first
    assert not kept.captured
    assert gpu.stream == "first"


def test_a_graph_takes_over_what_was_uploaded_before_and_it_is_never_given_up(gpu):
    kept = Plans()
    first = kept.find("name", DEVICE, object)
    gpu.captured, gpu.stream = True, "of the capture"
    for _ in range(2):  # kept once, however many captures read it
        assert kept.find("name", DEVICE, object) is first
    gpu.captured = False
    for name in range(2 * KEPT):
        kept.find(name, DEVICE, object)
    assert first not in kept.recent.values()
    assert kept.captured == [first]


def test_what_a_graph_uploads_is_its_own(gpu):
    kept = Plans()
    gpu.captured = True
    of_the_graph = kept.find("name", DEVICE, object)
    assert kept.captured == [of_the_graph]
    gpu.captured = False
    assert kept.find("name", DEVICE, object) is not of_the_graph


def test_arrays_arrive_as_they_are():
    arrays = [np.arange(7, dtype=np.int64).reshape(1, 7), np.arange(-3, 0, dtype=np.int32), np.empty((0, 4), np.int32)]
    tensors, host = uploaded(arrays, torch.device("cpu"))
    for tensor, array in zip(tensors, arrays, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array))
        assert not tensor.numel() or (tensor.data_ptr() - host.data_ptr()) % plans.ALIGNMENT == 0
