"""One function over many shards in a pool of processes, with a bar. Imports no torch.

    scans = parallel.each(scan, tars, "indexing", workers=4)

Ctrl-C and a killed parent end the processes; the first exception of one ends the others and is raised here.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from multiprocessing.sharedctypes import Synchronized
from typing import TypeVar

from vitdist import console

Item = TypeVar("Item")
Result = TypeVar("Result")

_done: Synchronized
"""What all processes of the pool have done; set in each of them."""


def advance(number: int = 1) -> None:
    """In `work` of `each`: count `number` units as done. Raises KeyboardInterrupt once the parent gives up."""
    with _done.get_lock():
        if _done.value < 0:
            raise KeyboardInterrupt
        _done.value += number


def each(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    what: str,
    *,
    unit: str = "shards",
    total: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> list[Result]:
    """`work` of each item, in the order of the items, in as many processes as there are cores.

    Without `total` each finished item counts as one unit; with it `work` counts by `advance`.
    """
    if not items:
        return []
    context = multiprocessing.get_context("fork")
    done = context.Value("q", 0)
    workers = min(workers or len(os.sched_getaffinity(0)), len(items))
    pool = ProcessPoolExecutor(workers, context, _in_worker, (done,))
    try:
        futures = [pool.submit(work, item) for item in items]
        with console.progress(what, len(items) if total is None else total, unit, progress) as show:
            waiting = set(futures)
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                show(len(futures) - len(waiting) if total is None else done.value)
                for future in finished:
                    future.result()
    except BaseException:
        done.value = -(1 << 62)  # those at work end at their next `advance` instead of finishing a shard
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def _in_worker(done: Synchronized) -> None:
    global _done
    _done = done
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the pool


def end_with_parent() -> None:
    """In a process of a pool: do not outlive a parent that was killed, which the pool's own workers do."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
