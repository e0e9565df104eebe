"""What the ranks of tests/vitdist/test_watchdog.py and test_metrics.py do."""

import errno
import itertools
import os
import re
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from vitdist import dist, metrics, rundir, watchdog
from vitdist.rundir import Attempt
from vitdist.watchdog import Watchdog


def wait_until_stopped(pid: int) -> None:
    """Until SIGSTOP has arrived; fails after 20 s."""
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.01)


def groups_with_a_bound() -> list[str]:
    """Rank 1 stops; what rank 0's collectives say, over a group as ZeRO makes its own, `control` and `background`."""
    with dist.processes(1, timeout_s=60) as me:
        groups = [torch.distributed.new_group([0, 1]), me.control, me.background]
        for group in groups:
            torch.distributed.barrier(group=group)
        pids = me.gather(os.getpid())
        dist.bound_all_groups(0.5)
        if not me.first:
            os.kill(os.getpid(), signal.SIGSTOP)
            return []
        wait_until_stopped(pids[1])
        said = []
        try:
            for group in groups:
                try:
                    torch.distributed.all_reduce(torch.ones(4), group=group)
                    said.append("no error")
                except RuntimeError as error:
                    said.append(str(error))
        finally:
            os.kill(pids[1], signal.SIGCONT)
        return said


def two_threads(rounds: int) -> tuple[list[Any], list[Any]]:
    """What a thread and the main thread gather at once, each in its own group."""
    with dist.processes(1) as me:
        behind: list[Any] = []

        def write() -> None:
            behind.extend(me.gather((me.rank, -i), me.background) for i in range(rounds))

        thread = threading.Thread(target=write)
        thread.start()
        ahead = [me.gather((me.rank, i)) for i in range(rounds)]
        thread.join(30)
        return ahead, behind


# ---- hangs ------------------------------------------------------------------------------------------


def stand_still() -> None:
    """Hang, as a deadlock in one's own code does."""
    threading.Event().wait()


def hold_the_lock() -> None:
    """Hang in C with the interpreter's lock held, for longer than any test takes."""
    re.match("(a+)+$", "a" * 60 + "!")


def stop_as_a_whole() -> None:
    """Stop every thread of this process, until another one sends SIGCONT; then live for some ticks of the watchdog."""
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.3)


def two_ranks(folder: str, limit_s: float, how: str, rank_1_limit_s: float | None = None) -> str:
    """Three steps of training; in the fourth rank 1 hangs in its own way and rank 0 waits in a collective operation."""
    attempt = Attempt(Path(folder))
    with dist.processes(1, timeout_s=60) as me:
        sys.stderr = open(attempt.path / f"stderr-{me.rank}", "w", buffering=1)  # noqa: SIM115
        pids = me.gather(os.getpid())

        def on_hang(text: str) -> None:
            (attempt.path / f"on_hang-{me.rank}").write_text(text)
            if me.first and how != "stand_still":
                os.kill(pids[1], signal.SIGCONT if how == "stop_as_a_whole" else signal.SIGKILL)

        with Watchdog(attempt, me.rank, me.world, limit_s, on_hang) as dog:
            for step in range(4):
                dog.mark(step, "training", None if me.first else rank_1_limit_s)
                if step == 3 and not me.first:
                    globals()[how.removesuffix("_late")]()
                    return "went on"
                me.barrier()
    return "no hang"


def alone(folder: str, how: str) -> None:
    """One process that hangs while the run folder does."""
    attempt = Attempt(Path(folder))
    sys.stderr = open(attempt.path / "stderr", "w", buffering=1)  # noqa: SIM115

    def publish_json(path: Path, record: object) -> None:
        if how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stand_still()

    rundir.publish_json = publish_json
    watchdog.REPORT_S = 0.3
    with Watchdog(attempt, 0, 1, 0.5, (attempt.path / "on_hang").write_text, grace_s=0.1):
        stand_still()


def debugged(folder: str) -> bool:
    """Whether a process whose main thread is in a debugger lives on after its limit."""
    with Watchdog(Attempt(Path(folder)), 0, 1, 0.2) as dog:

        def prompt(goes_on: Callable[[], bool]) -> bool:
            while goes_on():
                pass
            return True

        in_pdb = types.FunctionType(prompt.__code__, {"__name__": "pdb"})
        seen = [0.0]

        def forgiven_twice() -> bool:
            seen.append(dog._waited)
            return sum(after < before for before, after in itertools.pairwise(seen)) < 2

        return in_pdb(forgiven_twice)


def busy(folder: str, marks: int) -> list[str]:
    """A process that goes on for longer than its limit; what it leaves in the run folder."""
    attempt = Attempt(Path(folder))
    with Watchdog(attempt, 0, 1, 0.2) as dog:
        for step in range(marks):
            dog.mark(step, "training")
            seen = dog._mark
            while dog._waited == 0 or dog._mark is not seen:  # until the watchdog has counted since the mark
                time.sleep(0.001)
    return [str(path) for path in attempt.path.rglob("*") if path.is_file()]


# ---- a slow rank ------------------------------------------------------------------------------------


def a_slow_rank() -> tuple[dict[str, float], list[str]]:
    """Rank 1 computes 50 times as much in its forward passes; the figures of the last row, and what was said."""
    with dist.processes(1) as me:
        meter, lags, texts = metrics.Meter(8, 1e9, me.world, me.device), metrics.Lags(), []
        hosts, matrix = me.gather(socket.gethostname()), torch.ones(96, 96)
        for _ in range(100):  # rows of the log, until one says it
            for _ in range(5):
                with meter.computing():
                    for _ in range(200 if me.rank == 1 else 4):
                        matrix = (matrix @ matrix) / 96
                me.barrier()  # as in the backward pass: here rank 0 waits
                meter.step()
            owns = me.gather(meter.own())
            step_s = me.from_first(meter.row(0)["perf/step_s"])
            figures = metrics.lag(owns, step_s)
            texts += [text for _, text in lags.see(owns, step_s, hosts)]
            if texts:
                break
    return figures, texts
