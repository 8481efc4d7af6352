"""Reading batches ahead: lifetime of the buffers, and errors when the iteration ends early."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from plain_pair import module_names, write_pair

from safelora_fast import _core
from safelora_fast.checkpoints.sources import open_checkpoint
from safelora_fast.projection.device.reader import Wanted, WeightReader
from safelora_fast.subspace.plan import plan_subspace

ONE_MODULE = 1  # one byte, so that each batch has a single module


@pytest.fixture
def reader(tmp_path):
    pair = write_pair(tmp_path)
    plan = plan_subspace(
        open_checkpoint(pair.aligned, role="aligned"), open_checkpoint(pair.base, role="base"), endings=None
    )
    modules = [Wanted(index, planned) for index, planned in enumerate(plan.modules)]
    made = WeightReader(modules, torch.device("cpu"), threads=1, batch_bytes=ONE_MODULE)
    yield made
    made.close()


class SlowCopy:
    """Replaces `_core.copy_views`: the second read waits until it is released, and then checks the buffers."""

    def __init__(self, monkeypatch, error=None):
        self.started, self.go = threading.Event(), threading.Event()
        self.alive = None
        self._copy, self._error, self._calls = _core.copy_views, error, 0
        self._buffers = []
        make = torch.empty

        def empty(*size, **options):
            made = make(*size, **options)
            self._buffers.append(weakref.ref(made))
            return made

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(_core, "copy_views", self)

    def __call__(self, views, targets, *, threads=None):
        self._calls += 1
        if self._calls == 2:
            self.started.set()
            assert self.go.wait(60)
            self.alive = self._holds(targets)
            if self._error is not None:
                raise self._error
            if not self.alive:
                return  # the memory may have been reused
        self._copy(views, targets, threads=threads)

    def _holds(self, targets):
        """Return whether a live buffer contains the targets."""
        buffers = [buffer for buffer in (reference() for reference in self._buffers) if buffer is not None]
        begin, end = targets[0][0], targets[-1][0] + targets[-1][1]
        return any(buffer.data_ptr() <= begin and end <= buffer.data_ptr() + buffer.nbytes for buffer in buffers)


def consume(reader, slow, error):
    """Take one batch, and raise an error while the next one is being read."""
    for _ in reader:
        assert slow.started.wait(60)
        raise error


def consume_and_close(reader, slow, error):
    try:
        consume(reader, slow, error)
    finally:
        slow.go.set()
        reader.close()


@pytest.mark.parametrize("way", ["raised", "interrupted", "closed", "dropped"])
def test_a_buffer_outlives_the_read_into_it(reader, monkeypatch, way):
    slow = SlowCopy(monkeypatch)
    if way in {"raised", "interrupted"}:
        error = ValueError("of the consumer") if way == "raised" else KeyboardInterrupt()
        with pytest.raises(type(error)):
            consume(reader, slow, error)
    else:
        batches = iter(reader)
        next(batches)
        assert slow.started.wait(60)
        if way == "closed":
            batches.close()
        del batches
    gc.collect()
    slow.go.set()
    reader.close()
    assert slow.alive


def test_close_waits_for_the_read(reader, monkeypatch):
    slow = SlowCopy(monkeypatch)
    batches = iter(reader)
    next(batches)
    assert slow.started.wait(60)
    closing = threading.Thread(target=reader.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    assert slow.alive is None
    slow.go.set()
    closing.join(60)
    assert slow.alive
    assert list(batches) == []


def test_the_error_of_the_consumer_comes_first(reader, monkeypatch):
    slow = SlowCopy(monkeypatch, OSError("of the reader"))
    with pytest.raises(ValueError, match="of the consumer") as raised:
        consume_and_close(reader, slow, ValueError("of the consumer"))
    assert slow.alive
    assert raised.value.__context__ is None


def test_the_error_of_a_read_reaches_the_consumer(reader, monkeypatch):
    slow = SlowCopy(monkeypatch, OSError("of the reader"))
    slow.go.set()
    batches = iter(reader)
    next(batches)
    with pytest.raises(OSError, match="of the reader"):
        next(batches)
    assert list(batches) == []


def test_what_is_read_while_a_batch_is_used(reader):
    """Weights arrive in the order of the plan while the next batch is being read."""
    names, norms = [], []
    for batch in reader:
        (pair,) = batch
        names.append(pair.wanted.planned.name)
        norms.append(float((pair.aligned - pair.base).norm()))
    assert sorted(names) == sorted(module_names())
    assert len(set(norms)) == len(norms)
    assert all(norm > 0 for norm in norms)
