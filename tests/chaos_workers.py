"""What benchmarks/chaos.py starts from the fork server: an agent as torchrun's, and the ranks below it.

A start of a training costs 10 s and more of imports under torchrun. Forked from a parent that has them, the same
ranks reach their first step in about a second, so that many rounds fit into minutes.
"""

import atexit
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from vitdist import console, rundir

AGENT, RANK = "chaos-agent", "chaos-rank-"
"""Names of the processes, to be found by; the kernel keeps 15 letters."""
_SET_NAME = 15
"""PR_SET_NAME of prctl(2)."""
_POLL_S = 0.02


def agent(folder: str, start: int, world: int, port: int, arguments: list[str], patience_s: float) -> None:
    """Start `world` ranks of `python -m vitdist.train ARGUMENTS` in `folder` and see to them until all have ended.

    As torchrun does: TERM and INT are passed on, USR2 is ignored, one rank's failure ends the others, with TERM and
    after `patience_s` seconds KILL. The ranks' exit codes are published as codes-START.json in `folder`, by rank.
    """
    os.setsid()
    os.chdir(folder)
    _name(AGENT)
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    ranks: dict[int, int] = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _rank(start, rank, world, port, arguments)
        ranks[pid] = rank
    codes: dict[int, int] = {}
    kill_at = float("inf")
    while len(codes) < world:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in ranks:
            codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
            continue
        passed, asked = asked, []
        failed = any(codes.values()) and kill_at == float("inf")
        for number in [*passed, *([signal.SIGTERM] if failed else [])]:
            _send(ranks, codes, number)
            kill_at = min(kill_at, time.monotonic() + patience_s)
        if time.monotonic() > kill_at:
            _send(ranks, codes, signal.SIGKILL)
        time.sleep(_POLL_S)
    rundir.publish(Path(f"codes-{start}.json"), json.dumps([codes[rank] for rank in range(world)]))


def _send(ranks: dict[int, int], codes: dict[int, int], number: int) -> None:
    for pid, rank in ranks.items():
        if rank not in codes:  # neither ended nor reaped: the number is still its own
            os.kill(pid, number)


def _rank(start: int, rank: int, world: int, port: int, arguments: list[str]) -> None:
    """The trainer as a process of its own; does not return."""
    os.setsid()
    _name(f"{RANK}{rank}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(f"output-{start}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
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
    code = 1
    try:
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - for the life of the process
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # type: ignore[misc]  # noqa: SIM115
        console.spare_output()
        from vitdist import train as trainer
        from vitdist.report import charts

        charts.vega = lambda: "window.vegaEmbed = null;"  # type: ignore[assignment]  # the real scripts take 3 s
        _note_samples(trainer, Path(f"samples-{start}.{rank}"))
        code = trainer.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        # What the interpreter does at its end: W&B's service is told to go there.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        os._exit(code)


def _note_samples(trainer: Any, path: Path) -> None:
    """Leave the index rows of each step's samples on this rank in `path`, a line of JSON a step."""
    original = trainer._update

    def update(session: Any, batches: Any, broken: Any, skips: Any) -> Any:
        step = session.engine.steps
        result = original(session, batches, broken, skips)
        rows = [row for ids, _ in skips.seen for row in ids.tolist()]
        with open(path, "a") as file:
            file.write(json.dumps({"step": step, "world": session.me.world, "rows": rows}) + "\n")
        return result

    trainer._update = update


def _name(name: str) -> None:
    """Of this process, as /proc/PID/comm shows it."""
    ctypes.CDLL(None).prctl(_SET_NAME, name.encode(), 0, 0, 0)
