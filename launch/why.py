"""Why an attempt ended, from its folder alone: the rank that failed first, apart from those that its end took along.

cause(run.attempt(0)).text      # "FloatingPointError: loss is nan (rank 3, step 7)"
"""

import re
import signal
from pathlib import Path
from typing import NamedTuple

from launch import torchrun
from vitdist import faults, rundir
from vitdist.rundir import Attempt


class Cause(NamedTuple):
    text: str
    """One line."""
    cascade: bool
    """Whether it tells only of another rank's end."""


_ERROR_LINE = re.compile(r"^(rank \d+: )?(error: |[A-Za-z_][\w.]*(Error|Exception|Exit|Failed|Interrupt)\b)")


def cause(attempt: Attempt) -> Cause:
    """Why an attempt failed, in one line, from what its ranks left behind."""
    noted = {fault.rank: fault for fault in faults.read(attempt)}
    told = [(fault.cascade, fault.time, faults.line(fault)) for fault in noted.values()]
    record = rundir.read_json(attempt.train) or {}
    error = record.get("error")
    if error and error["rank"] not in noted:  # its disk was full, or it ended before it could note anything
        text = f"{error['type']}: {faults.one_line(error['message'])} (rank {error['rank']}, step {error['step']})"
        told.append((faults.peer_gone(text), 0.0, text))
    # That a rank hangs others may have noted for it, also of one that was killed: then what came first counts.
    spoke = {rank for rank, fault in noted.items() if fault.word != "hang"} | ({error["rank"]} if error else set())
    logs = sorted(attempt.path.glob("logs/node-*/torchrun.log"), key=lambda log: int(log.parent.name[len("node-") :]))
    for log in logs:
        for failure in torchrun.failures(tail(log)):
            killed = failure.code < 0 and failure.rank not in spoke
            if killed or (failure.code != rundir.EXIT_STOPPED and failure.rank not in spoke | noted.keys()):
                text, peer = _of_rank(failure, log.parent / f"rank-{failure.rank}.log", log)
                told.append((peer, failure.time, text))
    if told:
        peer, _, text = min(told)
        return Cause(text, peer)
    for path in sorted(attempt.path.glob("logs/node-*/node.json")):
        node = rundir.read_json(path) or {}
        if node.get("cause"):
            return Cause(f"{node['host']}: {node['cause']}", False)
    for log in logs:
        if line := _last_line(tail(log)):
            return Cause(f"{line} ({log})", False)
    return Cause(f"no trainer left a word; the node logs are in {attempt.path.parents[1] / 'submitit'}", True)


def _of_rank(failure: torchrun.Failure, log: Path, torchrun_log: Path) -> tuple[str, bool]:
    if failure.code < 0:
        name = signal.Signals(-failure.code).name
        # NCCL's own watchdog aborts the process of a rank that waited too long for another one.
        waited = name == "SIGABRT" and "ollective operation timeout" in tail(log)
        hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        return f"rank {failure.rank} was killed by {name}{hint} ({log})", waited
    line = _last_line(tail(log)) or _last_line(tail(torchrun_log))
    return f"rank {failure.rank}: {line.removeprefix(f'rank {failure.rank}: ')} ({log})", faults.peer_gone(line)


def _last_line(text: str) -> str:
    """The last line that names an error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if _ERROR_LINE.match(line)), lines[-1] if lines else "")


def tail(path: Path) -> str:
    """The end of a log; a trainer may have written gigabytes."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 200_000))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
