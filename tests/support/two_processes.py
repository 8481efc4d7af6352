"""Two processes of a process group, forked from a server that imports torch and the trainers once for all tests."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import traceback
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# What takes seconds to import. The modules that transformers and TRL import late are named too.
PRELOADED = (
    "torch", "torch.distributed.fsdp", "torch._dynamo", "datasets", "accelerate", "peft", "transformers.trainer",
    "transformers.models.llama.modeling_llama", "trl.trainer.sft_trainer",
)  # fmt: skip
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
SECONDS = 300  # processes that wait for each other would never end


@functools.cache
def _context() -> Any:
    """Return a context whose server has been started with the environment of the processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def in_two_processes(folder: Path, work: Callable[..., None], *args: Any) -> None:
    """Run `work(*args)` in two processes, with the environment variables that torchrun gives them.

    Args:
        folder: for the traceback of a process that fails.
        work: a function that another process can import.
        args: its arguments.
    """
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _run([{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)], folder, work, args)


def in_one_process(folder: Path, work: Callable[..., None], *args: Any) -> None:
    """Run `work(*args)` in another process, e.g. a launcher that forks more of them."""
    _run([{}], folder, work, args)


def _run(environments: list[dict[str, str]], folder: Path, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    found = [folder / f"traceback-{number}" for number in range(len(environments))]
    processes = [
        _context().Process(target=_work, args=({**ENVIRONMENT, **environment}, file, work, args))
        for environment, file in zip(environments, found, strict=True)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(SECONDS)
            if process.exitcode != 0:
                break
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    told = "\n".join(file.read_text()[-4000:] for file in found if file.exists())
    assert codes == [0] * len(codes), f"exit codes {codes} (None: did not end)\n{told}"


def _work(environment: dict[str, str], file: Path, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    try:
        work(*args)
    except BaseException:
        file.write_text(traceback.format_exc())
        raise SystemExit(1) from None
