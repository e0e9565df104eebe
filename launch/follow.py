"""Watch a run until it ends: the bar while it runs, then the result, or the cause of its end, and an exit code.

    code = follow(run, Slurm("4711"), since=0)      # EXIT_DONE, EXIT_STOPPED or 1
    code = attached(run, "4711", since=0)           # the same, and a Ctrl-C leaves the job running and says so

All that it shows comes from the run folder; the scheduler is asked only whether there is still a job, and why it waits.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from launch import pending, slurm, status, why
from vitdist import console, rundir
from vitdist.rundir import RunDir

LOOK_S = 0.5
SILENCE_S = 15.0
"""A job that SLURM no longer shows for this long has ended without a record."""
SETTLE_S = 1.0
"""Between two questions while only SLURM's word of an end is missing."""
TOLD_S = 120.0
"""SLURM's silence is told after this: a busy controller does not answer for a minute now and then."""
EXIT_FAILED = 1
EXIT_LEFT = 130
"""The watching was interrupted; the job goes on."""


class Job(Protocol):
    """What a scheduler can say of a job."""

    def state(self) -> str:
        """In a word; "PENDING (Priority)" and the like."""
        ...

    def waits(self) -> str:
        """Why it waits, in words; "" if it does not."""
        ...

    def silent_s(self) -> float:
        """How long the scheduler has not answered."""
        ...

    def over(self) -> bool:
        """Whether it has ended, whatever the run folder says."""
        ...

    def settled(self) -> bool:
        """Whether an end that the run folder tells is the last: no next start is to come that the node job has not
        asked for, as after a node's end."""
        ...


@dataclass
class Local:
    """submitit's controller of the simulated nodes: our child."""

    process: "subprocess.Popen[bytes]"

    def state(self) -> str:
        return "starting" if self.process.poll() is None else "ended"

    def waits(self) -> str:
        return ""

    def silent_s(self) -> float:
        return 0.0

    def over(self) -> bool:
        return self.process.poll() is not None

    def settled(self) -> bool:
        return self.over()


@dataclass
class Here:
    """A run of this machine that another command has started."""

    run: RunDir
    patience_s: float = 3.0
    """For the moment between two processes of one run."""
    _gone_since: float | None = field(default=None, init=False)

    def state(self) -> str:
        return "starting" if self._gone_since is None else "ended"

    def waits(self) -> str:
        return ""

    def silent_s(self) -> float:
        return 0.0

    def over(self) -> bool:
        attempts = self.run.attempts()
        job = (rundir.read_json(attempts[-1].job) if attempts else None) or {}
        if status.is_here(self.run, job):
            self._gone_since = None
        else:
            self._gone_since = self._gone_since or time.monotonic()
        return self._gone_since is not None and time.monotonic() > self._gone_since + self.patience_s

    def settled(self) -> bool:
        return True


@dataclass
class Slurm:
    job_id: str
    every_s: float = 5.0
    _known: slurm.Job | None = field(default=None, init=False)
    _state: str = field(default="UNKNOWN", init=False)
    _asked: float = field(default=float("-inf"), init=False)
    _ended_since: float | None = field(default=None, init=False)
    _silent_since: float | None = field(default=None, init=False)

    def state(self) -> str:
        return self._ask(self.every_s)

    def _ask(self, every_s: float) -> str:
        if time.monotonic() >= self._asked + every_s:
            self._heard(slurm.jobs([self.job_id], 10.0), time.monotonic())
            self._asked = time.monotonic()
        return self._state

    def _heard(self, answer: Mapping[str, slurm.Job] | None, now: float) -> None:
        if answer is None:
            self._silent_since = self._silent_since or now
            self._state, self._ended_since = "UNKNOWN", None
            return
        self._silent_since = None
        self._known = known = answer.get(self.job_id)
        self._state = "GONE" if known is None else f"{known.state} ({known.reason})" if known.reason else known.state
        ended = known is None or known.state in ENDED
        self._ended_since = (self._ended_since or now) if ended else None

    def waits(self) -> str:
        known = self._known
        waiting = known is not None and known.state in status.WAITING and self._state != "UNKNOWN"
        return pending.told(known, datetime.now(), countdown=False) if waiting and known else ""

    def silent_s(self) -> float:
        return 0.0 if self._silent_since is None else time.monotonic() - self._silent_since

    def over(self) -> bool:
        # Not at the first sight: a job that is being requeued passes through such states.
        return self._ended_since is not None and time.monotonic() > self._ended_since + SILENCE_S

    def settled(self) -> bool:
        # Where SLURM is silent the record is believed.
        return self._ask(SETTLE_S) == "UNKNOWN" or self._ended_since is not None


ENDED = status.ENDED
QUEUED = {
    *status.WAITING,
    *("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "RESIZING", "SIGNALING", "STOPPED"),
}


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


class News:
    """What is worth a line of its own: starts, their ends, why the job waits, SLURM's silence; each is told once."""

    def __init__(self, since: int) -> None:
        self._since = since
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._waits = ""
        self._silent = False

    def of(self, run: RunDir, job: Job) -> list[str]:
        """Lines that were not told yet."""
        lines = []
        for attempt in run.attempts():
            if attempt.number >= self._since and attempt.number not in self._ended:
                lines += self._of_attempt(attempt)
        waits = job.waits()
        if waits != self._waits and waits:
            lines.append(f"pending: {waits}")
        self._waits = waits
        if job.silent_s() > TOLD_S and not self._silent:
            lines.append("SLURM does not answer; what is shown comes from the run folder alone")
            self._silent = True
        elif self._silent and not job.silent_s():
            lines.append("SLURM answers again")
            self._silent = False
        return lines

    def _of_attempt(self, attempt: rundir.Attempt) -> list[str]:
        launched, record, lines = rundir.read_json(attempt.job) or {}, rundir.read_json(attempt.train) or {}, []
        number, ended = attempt.number, launched.get("state") not in (None, "running")
        if number not in self._begun and (ended or "resumed_from" in record):
            self._begun.add(number)
            step = record.get("resumed_from")
            where = status.compressed(launched.get("hosts") or ())
            begins = f"goes on from step {step}" if step else "begins at step 0" if record else "has not begun to train"
            lines.append(f"attempt {number}{f' on {where}' if where else ''} {begins}")
        if ended:
            self._ended.add(number)
            if launched["state"] == "requeued":  # other ends are the run's, and told at length
                cause = why.split(launched.get("cause") or f"stopped by {record.get('reason') or 'SLURM'}")[0]
                reached = f" at step {record['step']}" if record.get("step") is not None else ""
                rule = f" ({launched['decision']})" if launched.get("decision") and launched.get("cause") else ""
                left = f", without {', '.join(launched['exclude'])}" if launched.get("exclude") else ""
                lines.append(f"attempt {number} ended{reached}, {cause}: SLURM starts it again{rule}{left}")
        return lines


def follow(run: RunDir, job: Job, since: int, on_interrupt: Any = None) -> int:
    """Show attempt `since` and those that follow it until the run ends; returns the exit code.

    A Ctrl-C calls `on_interrupt` and goes on watching, or, where there is none, is passed on.
    """
    bar = console.Bar(run.name)
    rows, news = Rows(run.metrics, since), News(since)
    try:
        while True:
            try:
                over = job.over()  # before reading: what was recorded until then is read below
                record, launched = _records(run, since)
                _show(bar, rows, record, job)
                for line in news.of(run, job):
                    bar.print(line)
                if over or has_ended(launched, job):
                    break
                time.sleep(LOOK_S)
            except KeyboardInterrupt:
                if on_interrupt is None:
                    raise
                on_interrupt()
    finally:
        bar.close()
    return conclude(run, job, since)


def attached(run: RunDir, job_id: str | None, since: int, again: str) -> int:
    """`follow` for a run that another process trains: a Ctrl-C ends the watching alone, and that is said.

    `job_id`: None for a run of this machine. `again`: the command that watches it again.
    """
    try:
        return follow(run, Slurm(job_id) if job_id else Here(run), since)
    except KeyboardInterrupt:
        name = f"job {job_id}" if job_id else run.name
        print(f"{name} goes on; watch it again with: {again}", file=sys.stderr, flush=True)
        return EXIT_LEFT


def has_ended(launched: Mapping[str, Any], job: Job) -> bool:
    """Whether the launcher's record of the newest start is the end of the run, as far as the scheduler agrees."""
    state = launched.get("state")
    if state in ("done", "refused"):
        return not isinstance(job, Local) or job.over()
    return state in status.FINAL and job.settled()


def _records(run: RunDir, since: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trainer's and the launcher's record of the newest attempt; {} where there is none yet."""
    attempts = [attempt for attempt in run.attempts() if attempt.number >= since]
    if not attempts:
        return {}, {}
    return rundir.read_json(attempts[-1].train) or {}, rundir.read_json(attempts[-1].job) or {}


def _show(bar: console.Bar, rows: Rows, record: dict[str, Any], job: Job) -> None:
    rows.read()
    state = job.state()
    waits = job.waits()
    if waits or not record:
        if sys.stdout.isatty():  # elsewhere a job that waits for days would fill the log: News tells what changes
            bar.update(0, 0, phase=f"pending: {waits}" if waits else "starting" if state == "RUNNING" else state)
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
