"""Pure: how the starts of a job have ended -> whether SLURM shall start it again, and on which nodes not.

    decide([Start("failed", began=0, reached=100, word="killed")], most=None)      # Decision(again=True, ...)

Time limits, preemptions and lost nodes are not counted: a run of a week has dozens. A crash is, as long as no new
checkpoint follows: counting requeues instead, as torchx and NeMo-Run do by SLURM_RESTART_COUNT, leaves a run that was
preempted five times without a retry. That a run without progress is ended after three starts is the rule of NVIDIA's
resiliency extension.
"""

from collections.abc import Sequence
from dataclasses import dataclass

CRASHES = 3
"""Starts in a row that crash, or run out of time, without a new checkpoint."""

# Another start ends the same, whatever node it is on.
FINAL = frozenset(
    {
        "configuration_validation_failure",
        "filesystem_permission_denied",
        "disk_full",
        "too_many_open_files",
        "checkpoint_compatibility_mismatch",
        "checkpoint_damaged",
        "superseded",
        "shape_mismatch",
        "cuda_oom",
        "nan_or_inf",
        "data_failure",
        "user_cancelled",
    }
)
OF_THE_NODE = frozenset({"gpu_failure", "software_missing", "node_check_failed", "never_came"})
"""Words whose host is left out of the next start. A hang counts from its second time on the same host."""


@dataclass(frozen=True)
class Start:
    """How one start ended."""

    state: str
    """done, stopped, refused, failed; running: it was cut off, by a node's end or SLURM's own requeue."""
    began: int = 0
    """Step of the checkpoint that it went on from."""
    reached: int = 0
    """Step of the newest whole checkpoint after it."""
    word: str | None = None
    """Of vitdist.faults.WORDS, or node_check_failed, never_came; None where no rank said why."""
    error: str | None = None
    """Type of the exception that began it; None for one that was killed."""
    step: int = 0
    """Where it failed."""
    hosts: tuple[str, ...] = ()
    """Nodes that the failure points at."""
    out_of_time: bool = False
    """Stopped by its time limit, not by a preemption."""
    wished: bool = False
    """Stopped because the user asked for it (`launch/jobs.py RUN stop`)."""


@dataclass(frozen=True)
class Decision:
    again: bool
    why: str
    """A clause that follows "not started again: " or "starts again: "."""
    exclude: tuple[str, ...] = ()
    """Nodes that the next start shall not use, sorted."""
    of: Start | None = None
    """The start that it follows, for the record."""


def decide(starts: Sequence[Start], most: int | None) -> Decision:
    """What follows the last of the `starts` of a job; `most`: starts that the profile allows, None: no limit."""
    last = starts[-1]
    bad = blamed(starts)
    if last.state in ("done", "refused"):
        return Decision(False, "it is done" if last.state == "done" else "its settings were refused")
    if last.wished:
        return Decision(False, "it was asked to stop")
    if most is not None and len(starts) >= most:
        return Decision(False, f"the profile allows {most} starts (max_starts)")
    fruitless = _fruitless(starts)
    if last.state == "failed":
        if last.word in FINAL:
            return Decision(False, f"another start would end the same ({last.word})")
        # Of the starts without a new checkpoint, and the one that brought the last: an error of a month ago is another.
        recent = starts[max(0, len(starts) - len(fruitless) - 1) : -1]
        if last.error and any((start.error, start.step) == (last.error, last.step) for start in recent):
            return Decision(False, f"the same {last.error} at step {last.step} twice")
        crashes = sum(start.state == "failed" for start in fruitless)
        if crashes >= CRASHES:
            return Decision(False, f"{crashes} starts in a row have failed without a new checkpoint")
        count = (
            f"crash {crashes} of {CRASHES} without a new checkpoint" if crashes else "a crash after a new checkpoint"
        )
        return Decision(True, count, bad)
    late = sum(start.out_of_time for start in fruitless)
    if late >= CRASHES:
        return Decision(False, f"{late} time limits in a row came before a new checkpoint: give it more --time")
    return Decision(True, "its time limit" if last.out_of_time else "stopped by SLURM", bad)


def _fruitless(starts: Sequence[Start]) -> list[Start]:
    """The last starts that gained no checkpoint, newest first."""
    found: list[Start] = []
    for start in reversed(starts):
        if start.reached > start.began:
            break
        found.append(start)
    return found


def blamed(starts: Sequence[Start]) -> tuple[str, ...]:
    """Nodes that some start pointed at."""
    named = {host for start in starts if start.word in OF_THE_NODE for host in start.hosts}
    hung = [host for start in starts if start.word == "hang" for host in set(start.hosts)]
    return tuple(sorted(named | {host for host in hung if hung.count(host) > 1}))
