"""The process that starts a node's trainers: torchrun, which ignores SLURM's warning, and does not outlive this one.

process = Torchrun(argv, env, cwd, log)
while process.poll() is None: process.look_after()
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

ASK_S = 1.0
"""A trainer that is still importing has not taken over USR2 and misses it: ask again this often."""
KILL_S = 2.0
"""From SIGTERM to SIGKILL for trainers that are stuck in a collective."""


class Torchrun:
    """The process that starts this node's trainers."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path, log: Path) -> None:
        self.stopping = False
        """Whether the trainers are asked to save and leave."""
        self._next_ask, self._kill_at = 0.0, float("inf")
        self._trainers: dict[int, str] = {}
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            # A session of its own: a Ctrl-C of the terminal is ours to pass on, once.
            self._popen = subprocess.Popen(
                command,
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_before_exec,
            )

    def poll(self) -> int | None:
        code = self._popen.poll()
        if code is not None:
            self._clean()
        return code

    def look_after(self) -> None:
        """Between two polls: repeat the wish to stop; kill what did not end when told to."""
        now = time.monotonic()
        self._find_trainers()
        if self.stopping and now >= self._next_ask:
            self._next_ask = now + ASK_S
            self._send(signal.SIGUSR2)
        if now >= self._kill_at:
            self._send(signal.SIGKILL)
            self._popen.kill()

    def end(self) -> None:
        """End it; trainers stuck in a collective do not hear SIGTERM, so they are killed soon after."""
        if self._kill_at == float("inf"):
            self._kill_at = time.monotonic() + KILL_S
            self._find_trainers()  # while torchrun lives: what it leaves behind is nobody's child
            self._popen.terminate()

    def _find_trainers(self) -> None:
        for child in _children(self._agent()):
            self._trainers.setdefault(child, birth(child))

    def _agent(self) -> int:
        """torchrun itself, which a container's runtime may have started in its turn; other children are not sought:
        W&B's and the loaders' do not take USR2 for a wish."""
        pid = self._popen.pid
        while deeper := [child for child in _children(pid) if "--nproc-per-node" in _command(child)]:
            pid = deeper[0]
        return pid

    def _send(self, number: signal.Signals) -> None:
        # Other children, if any, have inherited the ignored USR2; the trainers handle it.
        for trainer, born in list(self._trainers.items()):
            if born and born == birth(trainer):  # the number may be another process's by now
                with contextlib.suppress(ProcessLookupError):
                    os.kill(trainer, number)

    def _clean(self) -> None:
        """A torchrun that was killed leaves its trainers, each in a session of its own, on the GPUs."""
        self._send(signal.SIGKILL)
        self._trainers.clear()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended
        return []


def _command(pid: int) -> list[str]:
    """Its arguments; [] if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def birth(pid: int) -> str:
    """When a process was started, in the kernel's ticks; "" if it is gone or only waits to be reaped."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else rest[18]


# Before the fork: a child of a process with threads must not load a library.
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


def _before_exec() -> None:
    """USR2, which SLURM sends to every process, is not for torchrun; and it ends when this process does."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
