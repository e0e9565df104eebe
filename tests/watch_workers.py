"""What the ranks of tests/vitdist/test_watchdog.py and test_metrics.py do."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from vitdist import dist


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
