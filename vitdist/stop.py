"""The wish to stop: a flag that signals set and that the step loop reads. Imports no torch.

SLURM's warning (USR2), TERM and INT only set the flag: a handler that saved would run in the middle
of a collective operation. The loop agrees on the flag over all ranks at a step's end, saves, and
leaves with `rundir.EXIT_STOPPED`. `install` is called before the slow imports, so that a warning
that comes while they run is not lost.
"""

import ctypes
import signal
from types import FrameType

_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Set once, never taken back. `reason` is the first signal's name, or None."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is not None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.reason = self.reason or signal.Signals(number).name


def install() -> StopRequest:
    """Take over USR2, TERM and INT for this process."""
    request = StopRequest()
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request._ask)
    return request


def end_with_parent() -> None:
    """Have Linux end this process when the thread that started it ends, torchrun's main one.

    A trainer that outlives a killed torchrun holds its GPU, and the run's lock, against the next start.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def ignore_in_child() -> None:
    """For loader processes: SLURM signals every process of a job; only the rank itself answers."""
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
