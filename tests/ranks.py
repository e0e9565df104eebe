"""Real ranks for tests: processes forked from a parent that has torch and DeepSpeed loaded.

Importing them costs each process 6 s of CPU time; multiprocessing's fork server pays it once for all tests.
"""

import itertools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import pytest

# With what the end of a run needs: scores, the exported folder, the report.
_PRELOAD = [
    "torch",
    "deepspeed",
    "transformers.models.vit.modeling_vit",
    "transformers.models.vit.image_processing_vit",
    "sklearn.metrics",
    "vitdist.report.page",
    "vitdist.export",
    "vitdist.train",
    "tests.workers",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)


def matrix(sample: set[tuple[object, ...]], *sides: Iterable[object]) -> list[Any]:
    """Every combination of `sides`; those outside `sample` only in `make test-full`."""
    return [pytest.param(*p, marks=[] if p in sample else pytest.mark.full) for p in itertools.product(*sides)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(work: Callable[..., Any], world: int, *args: Any, timeout: float = 240) -> list[Any]:
    """Call `work(*args)` in `world` ranks; returns each one's result. Fails with the first rank's traceback.

    `work` lives in tests/workers.py: the fork server finds it by name.
    """
    port, pipes, processes = free_port(), [], []
    for rank in range(world):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=_child, args=(theirs, rank, world, port, work, args))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results, failures = [], []
    for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
        try:
            good, value = pipe.recv() if pipe.poll(timeout) else (False, f"no answer within {timeout} s")
        except EOFError:
            process.join(10)
            good, value = False, f"ended without an answer, exit code {process.exitcode}"
        results.append(value)
        if not good:
            failures.append(f"rank {rank}: {value}")
            timeout = 5  # the others wait for the failed one
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
    assert not failures, "\n".join(failures)
    return results


def _child(pipe: Any, rank: int, world: int, port: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        WANDB_MODE="offline",
    )
    try:
        pipe.send((True, work(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
