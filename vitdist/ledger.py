"""What a run has cost and kept so far, over all its starts. Imports no torch.

    past = [start(attempt, history.read(run).reached.get(attempt.number), faults.read(attempt)) for ...]
    ledger = Ledger(past, began, ranks, threads, gpu=True)
    ledger.row(step, trained_s)                     # run/wall_s, run/gpu_hours, run/lost_steps, run/goodput_pct

Lost are steps that were done and came to nothing, since a later start went on from an earlier step. Goodput is the
share of the steps done that were kept.
"""

import math
import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from vitdist import rundir
from vitdist.rundir import Attempt

if TYPE_CHECKING:
    from vitdist.faults import Fault
    from vitdist.history import Reached


class Start(NamedTuple):
    """One start of a run, as far as it came."""

    trained: bool
    """Whether it came to its training."""
    first: int
    """Step that it went on from."""
    last: int
    """Newest step that is known of."""
    seconds: float
    """From its beginning to its end, or to the last that it said."""
    ranks: int
    """0 for one that ended before it told; the next too."""
    threads: int
    """Of a rank."""


def start(attempt: Attempt, reached: "Reached | None", faults: "Sequence[Fault]") -> Start:
    """A start that is over; `reached`: how far it came by its rows, `faults`: what its ranks left."""
    record, job = rundir.read_json(attempt.train) or {}, rundir.read_json(attempt.job) or {}
    began, ended = (_seconds(record.get(key) or job.get(key)) for key in ("started", "ended"))
    step, seen = reached or (0, None)
    told = [seen or 0.0, *(fault.time for fault in faults)]
    first = record.get("resumed_from") or 0
    return Start(
        trained="resumed_from" in record,
        first=first,
        last=max(first, record.get("step") or 0, step, *(fault.step for fault in faults)),
        seconds=max(0.0, (ended or max(told)) - began) if began else 0.0,
        ranks=record.get("world", 0),
        threads=record.get("threads", 0),
    )


def _seconds(moment: str | None) -> float:
    return datetime.fromisoformat(moment).timestamp() if moment else 0.0


def undone(spans: Sequence[tuple[int, int]]) -> list[int]:
    """Of each span of training, (first, last) step, oldest first: the steps from which no later one went on."""
    lost, earliest = [], math.inf
    for first, last in reversed(spans):
        lost.append(int(max(0, last - max(first, earliest))))
        earliest = min(earliest, first)
    return lost[::-1]


def figures(starts: Sequence[Start], gpu: bool) -> dict[str, float]:
    """Figures of a run at the present moment of its newest start, the last of `starts`."""
    now = starts[-1]
    hours = sum(s.seconds * (s.ranks or now.ranks) * (1 if gpu else s.threads or now.threads) for s in starts) / 3600
    spans = [(s.first, s.last) for s in starts if s.trained]
    done, lost = sum(last - first for first, last in spans), sum(undone(spans))
    return {
        "run/wall_s": sum(s.seconds for s in starts),
        "run/gpu_hours" if gpu else "run/core_hours": hours,
        "run/restarts": len(starts) - 1,
        "run/lost_steps": lost,
        "run/goodput_pct": 100 * (done - lost) / done if done else 100.0,
    }


class Ledger:
    """Rows of the start that runs now; `began`: when it did, by time.monotonic()."""

    def __init__(self, past: Sequence[Start], began: float, ranks: int, threads: int, gpu: bool) -> None:
        self._past, self._began, self._gpu = list(past), began, gpu
        self._now = Start(trained=True, first=0, last=0, seconds=0.0, ranks=ranks, threads=threads)

    def goes_on_from(self, step: int) -> None:
        self._now = self._now._replace(first=step)

    def row(self, step: int, trained_s: float) -> dict[str, float]:
        """Figures at a step; `trained_s`: what this start has spent in steps."""
        now = self._now._replace(last=step, seconds=time.monotonic() - self._began)
        share = 100 * trained_s / now.seconds if now.seconds else 0.0
        return {**figures([*self._past, now], self._gpu), "run/training_pct": share}
