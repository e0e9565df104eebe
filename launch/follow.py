"""Watch a run until it ends: the bar while it runs, then the result, or the cause of its end, and an exit code.

    code = follow(run, Slurm("4711"), since=0)      # EXIT_DONE, EXIT_STOPPED or 1

All that it shows comes from the run folder; the scheduler is asked only whether there is still a job.
"""

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from launch import slurm, why
from vitdist import console, rundir
from vitdist.rundir import RunDir

LOOK_S = 0.5
SILENCE_S = 15.0
"""A job that SLURM no longer shows for this long has ended without a record."""
EXIT_FAILED = 1


class Job(Protocol):
    """What a scheduler can say of a job."""

    def state(self) -> str:
        """In a word; "PENDING (Priority)" and the like."""
        ...

    def over(self) -> bool:
        """Whether it has ended, whatever the run folder says."""
        ...


@dataclass
class Local:
    """submitit's controller of the simulated nodes: our child."""

    process: "subprocess.Popen[bytes]"

    def state(self) -> str:
        return "starting" if self.process.poll() is None else "ended"

    def over(self) -> bool:
        return self.process.poll() is not None


@dataclass
class Slurm:
    job_id: str
    every_s: float = 5.0
    _state: str = field(default="UNKNOWN", init=False)
    _asked: float = field(default=float("-inf"), init=False)
    _ended_since: float | None = field(default=None, init=False)

    def state(self) -> str:
        now = time.monotonic()
        if now >= self._asked + self.every_s:
            self._state, self._asked = slurm.state(self.job_id), now
            ended = self._state == "GONE" or self._state.split(" ")[0] in ENDED
            self._ended_since = (self._ended_since or now) if ended else None
        return self._state

    def over(self) -> bool:
        # Not at the first sight: a job that is being requeued passes through such states.
        return self._ended_since is not None and time.monotonic() > self._ended_since + SILENCE_S


ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "DEADLINE",
    "BOOT_FAIL",
    "PREEMPTED",
}
QUEUED = {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STAGE_OUT"}


class Rows:
    """The newest figures of metrics.jsonl, read as it grows; not those of attempts before `since`."""

    def __init__(self, path: Path, since: int) -> None:
        self._path, self._since = path, since
        self._at = 0
        self._rest = b""
        self.last: dict[str, Any] = {}

    def read(self) -> None:
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._at)
            new = file.read()
        self._at += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # what a killed writer left half-written
                row = json.loads(line)
                if row["attempt"] >= self._since:
                    self.last |= row


def follow(run: RunDir, job: Job, since: int, on_interrupt: Any = None) -> int:
    """Show attempt `since` and those that follow it until the run ends; returns the exit code.

    A Ctrl-C calls `on_interrupt` and goes on watching, or, where there is none, is passed on.
    """
    bar = console.Bar(run.name)
    rows = Rows(run.metrics, since)
    try:
        while True:
            try:
                over = job.over()  # before reading: what was recorded until then is read below
                record, ended = _records(run, since)
                _show(bar, rows, record, job)
                if over or (ended and not isinstance(job, Local)):
                    break
                time.sleep(LOOK_S)
            except KeyboardInterrupt:
                if on_interrupt is None:
                    raise
                on_interrupt()
    finally:
        bar.close()
    return conclude(run, job, since)


def _records(run: RunDir, since: int) -> tuple[dict[str, Any], bool]:
    """The trainer's record of the newest attempt, and whether its job has ended for good."""
    attempts = [attempt for attempt in run.attempts() if attempt.number >= since]
    if not attempts:
        return {}, False
    job = rundir.read_json(attempts[-1].job) or {}
    ended = job.get("state") in ("done", "stopped", "failed", "refused")
    return rundir.read_json(attempts[-1].train) or {}, ended


def _show(bar: console.Bar, rows: Rows, record: dict[str, Any], job: Job) -> None:
    rows.read()
    state = job.state()
    if not record or (record["state"] == "stopped" and state.startswith("PENDING")):
        bar.update(0, 0, phase="starting" if state == "RUNNING" else state)
        return
    last = rows.last
    bar.update(
        last.get("train/global_step", record.get("step") or 0),
        record.get("total_steps") or 0,
        loss=last.get("train/loss"),
        images_per_s=last.get("perf/images_per_s"),
        eta_s=last.get("perf/eta_s"),
        phase=record["state"],
    )


def conclude(run: RunDir, job: Job, since: int) -> int:
    """Say how the run ended."""
    attempts = [attempt for attempt in run.attempts() if attempt.number >= since]
    record = (rundir.read_json(attempts[-1].train) if attempts else None) or {}
    state = record.get("state")
    if state == "done":
        console.final_table(run, record.get("summary") or {})
        return rundir.EXIT_DONE
    if state == "stopped":
        step, start = record["step"], record.get("goes_on_from", record["step"])
        saved = "checkpoint saved" if start == step else f"no checkpoint of it but of step {start}"
        print(
            f"stopped at step {step} of {record['total_steps']}, {saved}; the same command with "
            f"--name {run.name} goes on from there"
        )
        return rundir.EXIT_STOPPED
    if not attempts:
        logs = sorted(run.submitit.glob("*_0_log.out"))
        where = f"; see {logs[-1]}" if logs else ""
        print(f"error: the job ended ({job.state()}) before it began{where}", file=sys.stderr)
        return EXIT_FAILED
    ended = rundir.read_json(attempts[-1].job) or {}
    cause = ended.get("cause") or f"{why.cause(attempts[-1]).text} (job: {job.state()})"
    print(f"error: {cause}", file=sys.stderr)
    return EXIT_FAILED
