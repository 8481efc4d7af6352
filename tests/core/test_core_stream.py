from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from dense import module, start

from safelora_fast import _core
from safelora_fast.errors import CheckpointError, SettingsError


def test_outcomes_come_in_the_order_of_the_jobs(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    modules = [module(tmp_path / str(i), rng, shape=(20 + 7 * i, 50), name=f"layer{i}") for i in range(12)]
    stream = start([given.job for given in modules], threads=2)
    for index, (outcome, given) in enumerate(zip(stream, modules, strict=True)):
        assert outcome.index == index
        assert outcome.v_norm == pytest.approx(np.linalg.norm(given.v), rel=1e-6)
    assert stream.bytes_done == sum(given.job.nbytes for given in modules)
    assert list(stream) == []


def test_a_stream_without_jobs_is_empty() -> None:
    assert list(start([])) == []


def test_closing_early_ends_the_iteration(tmp_path: Path) -> None:
    given = module(tmp_path, np.random.default_rng(2))
    stream = start([given.job] * 200)
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == []
    assert stream.bytes_done < 200 * given.job.nbytes


def stream_threads() -> list[str]:
    """Names of this process's threads that run or feed a stream, truncated as the system does."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            names.append((task / "comm").read_text().strip())
    return [name for name in names if name in ("safelora-fast-s", "safelora-fast-p")]


def test_dropping_a_stream_ends_its_threads(tmp_path: Path) -> None:
    given = module(tmp_path, np.random.default_rng(3))
    stream = start([given.job] * 50, threads=3)
    next(stream)
    assert "safelora-fast-s" in stream_threads()
    del stream
    gc.collect()
    assert stream_threads() == []


def test_an_error_ends_the_stream_after_the_jobs_before_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    good = module(tmp_path / "good", rng)
    bad = module(tmp_path / "bad", rng)
    path = tmp_path / "bad" / "base.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    stream = start([good.job, good.job, bad.job, good.job])
    assert [next(stream).index, next(stream).index] == [0, 1]
    with pytest.raises(CheckpointError, match='part0" holds NaN at row 69, column 129'):
        next(stream)
    assert list(stream) == []


def test_a_forked_child_does_not_touch_the_stream_of_its_parent(tmp_path: Path) -> None:
    given = module(tmp_path, np.random.default_rng(5))
    stream = start([given.job] * 20)
    next(stream)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with pytest.raises(RuntimeError, match="fork"):
                next(stream)
            stream.close()
            del stream
            (outcome,) = start([given.job], threads=2)
            code = 0 if outcome.factors[0].projected() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(list(stream)) == 19


def test_interrupt_works_at_once_and_leaves_no_thread_behind(tmp_path: Path) -> None:
    module(tmp_path, np.random.default_rng(6), shape=(700, 900), ranks=(64,))
    program = """
        import sys
        from safelora_fast import _core

        def whole(name, tensor):
            file = _core.SafetensorsFile(f"{sys.argv[1]}/{name}.safetensors")
            rows, cols = file.tensors[tensor][1]
            return _core.View(file, tensor, rows=rows, cols=cols, row_stride=cols)

        part = _core.Part(whole("aligned", "part0"), whole("base", "part0"))
        factors = _core.Factors(whole("adapter0", "B"), whole("adapter0", "A"))
        stream = _core.ProjectionStream([_core.Job("layer", [part], [factors])] * 10000, _core.Operator.frobenius())
        print("started", flush=True)
        try:
            for outcome in stream:
                pass
        except KeyboardInterrupt:
            stream.close()
            print("interrupted", flush=True)
            sys.exit(7)
    """
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "started\n"
    time.sleep(0.3)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert (run.returncode, output.strip()) == (7, "interrupted")


def test_threads_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAFELORA_FAST_NUM_THREADS", raising=False)
    assert 1 <= _core.default_threads() <= len(os.sched_getaffinity(0))
    monkeypatch.setenv("SAFELORA_FAST_NUM_THREADS", "3")
    assert _core.default_threads() == 3
    monkeypatch.setenv("SAFELORA_FAST_NUM_THREADS", "many")
    with pytest.raises(SettingsError, match='SAFELORA_FAST_NUM_THREADS is "many"; use a whole number'):
        start([])


def test_the_level_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = module(tmp_path, np.random.default_rng(7), ranks=(5, 18), weight_dtypes=("BF16", "F16"))
    monkeypatch.delenv("SAFELORA_FAST_CPU_LEVEL", raising=False)
    widest = _core.kernel_level()
    expected = [factors.projected() for factors in given.run().factors]
    monkeypatch.setenv("SAFELORA_FAST_CPU_LEVEL", "scalar")
    assert _core.kernel_level() == "scalar"
    assert [factors.projected() for factors in given.run().factors] == expected
    monkeypatch.setenv("SAFELORA_FAST_CPU_LEVEL", "sse9")
    with pytest.raises(SettingsError, match="sse9"):
        _core.kernel_level()
    features = _core.cpu_features()
    assert widest != "avx512" or (features["avx512f"] and features["avx512vl"])
    assert widest == "scalar" or features["avx2"]
