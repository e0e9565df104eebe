"""The state of a run from its folder and from what SLURM says, for lists and for people who wait.

    folder = look(run)                                   # what the newest attempt has left, read once
    queue = slurm.jobs(filter(None, [folder.job_id]), 10)     # None: silence
    status = judge(folder, queue, datetime.now().astimezone())

`judge` is pure. SLURM's silence is UNKNOWN: only an answer in which the job is missing makes it gone.
"""

import dataclasses
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from launch import pending, slurm, why
from vitdist import faults, manifest, rundir
from vitdist.rundir import Attempt, RunDir

FINAL = ("done", "stopped", "refused", "failed")
"""States of a job's record that are its end: nothing follows by itself."""
WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"),
    *("PREEMPTED", "REVOKED", "LAUNCH_FAILED"),
}
LIVE = ("pending", "starting", "running", "stopping", "suspended")
"""Words of `Status.state` of a run that goes on by itself."""
NEXT_START_S = 10.0
"""A job whose start lies so long after that of the newest attempt is at the next one: clocks of two hosts differ."""
_TAIL = 16_384
"""Bytes of metrics.jsonl: a row has some 600."""


@dataclass(frozen=True)
class Folder:
    """What a run folder tells, without the scheduler."""

    run: RunDir
    submitted: float
    """Unix seconds: when it was last sent off."""
    job_id: str | None = None
    """Of its newest job in SLURM; None for one that runs on this machine."""
    inside: bool = False
    """Whether that job is an allocation (`salloc`) which the run took, and which is not its own to end."""
    attempt: Attempt | None = None
    job: Mapping[str, Any] = field(default_factory=dict)
    """The launcher's record of the newest attempt."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """The trainer's."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The newest figures of that attempt."""
    stop: Mapping[str, Any] = field(default_factory=dict)
    """stop.json, if it is meant for the newest attempt: {"time", "by", "checkpoint"}."""
    saved: int | None = None
    """Step of the newest checkpoint by its name; whether it is whole nobody has looked."""
    here: bool = False
    """Whether a process of this machine trains it, or is about to."""
    broken: str = ""
    """Why the folder cannot be read."""


@dataclass(frozen=True)
class Status:
    """A run as it is told to people."""

    name: str
    path: str
    state: str
    """done, stopped, refused, failed, cancelled, gone; one of LIVE; new, UNKNOWN, unreadable."""
    job: str | None = None
    attempt: int | None = None
    step: int | None = None
    total: int | None = None
    eta_s: float | None = None
    images_per_s: float | None = None
    loss: float | None = None
    nodes: str = ""
    age_s: float = 0.0
    """Since it was last submitted."""
    note: str = ""
    """Its result, the cause of its end, or why it waits."""
    remedy: str = ""
    """What can be done about it; "": nothing, or nothing is known."""
    start: str | None = None
    """When a pending one is expected to start, in local time."""


# ---- reading -------------------------------------------------------------------------------------


def look(run: RunDir) -> Folder:
    """Read what the newest attempt of a run has left; never raises for what a folder holds."""
    submitted = 0.0
    try:
        submitted = max(_changed(path) for path in (run.cluster, run.config, run.path / "slurm_job"))
        attempts = run.attempts()
        attempt = attempts[-1] if attempts else None
        job = _record(attempt.job) if attempt else {}
        train = _record(attempt.train) if attempt else {}
        job_id = slurm.job_of(run)
        if job.get("scheduler") == "local" or (attempt and not job and train):  # it went on on a machine without SLURM
            job_id = job_id if job_id and _changed(run.path / "slurm_job") > _seconds(job, train) else None
        hosts = job.get("hosts") or []
        if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
            raise ValueError(f"{attempt.job.name if attempt else ''}: hosts is no list of names")
        other = str(job.get("job_id")) if job.get("scheduler") == "slurm" else job_id
        inside = other != job_id and _seconds(job) > _changed(run.path / "slurm_job")
        folder = Folder(
            run=run,
            submitted=submitted,
            job_id=other if inside else job_id,
            inside=inside,
            attempt=attempt,
            job=job,
            train=train,
            stop=_stop(run, job),
            saved=max(manifest.steps(run), default=None),
        )
        if not attempt or not _unfinished(folder):
            return folder
        here = job_id is None and is_here(run, job)
        return dataclasses.replace(folder, row=_newest_row(run.metrics, attempt.number), here=here)
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else f"a record is damaged: {error}"
        return Folder(run, submitted, broken=faults.one_line(str(reason), 200))


def _record(path: Path) -> dict[str, Any]:
    record = rundir.read_json(path) or {}
    if not isinstance(record, dict):
        raise ValueError(f"{path.name} holds no object")
    return record


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _seconds(*records: Mapping[str, Any]) -> float:
    """Unix seconds of the latest start in the records."""
    times = [record["started"] for record in records if record.get("started")]
    return max((datetime.fromisoformat(time).timestamp() for time in times), default=0.0)


def _stop(run: RunDir, job: Mapping[str, Any]) -> dict[str, Any]:
    wish = _record(run.path / "stop.json")
    since = max(_seconds(job), _changed(run.path / "slurm_job"))
    return wish if wish and datetime.fromisoformat(wish["time"]).timestamp() >= since else {}


def _newest_row(path: Path, attempt: int) -> dict[str, Any]:
    """The newest figures that an attempt has written, each the last of its name in the end of the file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return {}
    found: dict[str, Any] = {}
    for line in lines[1 if size > _TAIL else 0 :]:
        try:
            row = json.loads(line)
        except ValueError:  # the line that a writer has not ended yet
            continue
        if isinstance(row, dict) and row.get("attempt") == attempt:
            found |= row
    return found


def _unfinished(folder: Folder) -> bool:
    return folder.attempt is not None and folder.job.get("state") not in FINAL and folder.train.get("state") != "done"


def is_here(run: RunDir, job: Mapping[str, Any]) -> bool:
    """Whether a process trains a run that SLURM does not know: it holds the lock, or is its controller here."""
    return controller(run, job) is not None or holder(run) is not None or _locked(run)


def _locked(run: RunDir) -> bool:
    # A shared lock is refused by a trainer's exclusive one, and, unlike only_writer, makes no file.
    try:
        with open(run.path / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks on this file system
        return False
    return False


def controller(run: RunDir, job: Mapping[str, Any]) -> int | None:
    """The process of this machine that runs the simulated nodes, whose id is that of the job."""
    if job.get("scheduler") != "local" or socket.gethostname() not in job.get("hosts", []):
        return None
    try:
        pid = int(job["job_id"])
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError, KeyError):
        return None
    return pid if b"submitit.local._local" in argv and os.fsencode(run.submitit) in argv else None


def holder(run: RunDir) -> int | None:
    """The process of this machine that holds the run's lock: rank 0 of its trainers."""
    try:
        lock = os.stat(run.path / ".lock")
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in locks:
        match = re.match(r"\d+: FLOCK +\S+ +WRITE (\d+) \S+:(\d+) ", line)
        if match and int(match[2]) == lock.st_ino and _has_open(int(match[1]), lock):
            return int(match[1])
    return None


def _has_open(pid: int, wanted: os.stat_result) -> bool:
    # /proc/locks and stat name some file systems' devices differently.
    try:
        return any(os.path.samestat(os.stat(handle), wanted) for handle in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def read_all(runs: Sequence[RunDir], patience_s: float) -> tuple[list[Status], bool]:
    """The states of runs, and whether SLURM has answered; one question for all jobs that may still be there."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:  # shared file systems answer slowly, and several questions at once
        folders = list(pool.map(look, runs))
    queue = slurm.jobs((folder.job_id for folder in folders if folder.job_id and _is_asked_for(folder)), patience_s)
    now = datetime.now().astimezone()
    return [judge(folder, queue, now) for folder in folders], queue is not None


def read_one(run: RunDir, patience_s: float) -> tuple[Folder, Status]:
    """A run's folder and its state now."""
    folder = look(run)
    queue = slurm.jobs([folder.job_id] if folder.job_id else [], patience_s)
    return folder, judge(folder, queue, datetime.now().astimezone())


def _is_asked_for(folder: Folder) -> bool:
    return _may_live(folder) or folder.job.get("state") in ("stopped", "failed")


def _may_live(folder: Folder) -> bool:
    return folder.job.get("job_id") != folder.job_id or _unfinished(folder)


# ---- judging -------------------------------------------------------------------------------------


def judge(folder: Folder, queue: Mapping[str, slurm.Job] | None, now: datetime) -> Status:
    """Pure: the state of a run; `queue`: what SLURM knows of jobs, None if it is silent; `now`: with a time zone."""
    name, path = folder.run.name, str(folder.run.path)
    age_s = max(0.0, now.timestamp() - folder.submitted)
    if folder.broken:
        return Status(name, path, "unreadable", age_s=age_s, note=folder.broken)
    known = queue.get(folder.job_id) if queue is not None and folder.job_id else None
    silent = queue is None and folder.job_id is not None and _may_live(folder)
    state = _of_slurm(folder, known, silent) if folder.job_id else _of_here(folder)
    row, train = folder.row, folder.train
    live = state in LIVE
    reached = [n for n in (train.get("step"), row.get("train/global_step") if live else None) if isinstance(n, int)]
    eta_s = row.get("perf/eta_s") if state == "running" else None
    if eta_s is not None and row.get("time"):
        eta_s = max(0.0, eta_s - max(0.0, now.timestamp() - row["time"]))
    rate = row.get("perf/images_per_s") if state in ("running", "stopping") else None
    note, remedy = _note(folder, state, known, now)
    own = folder.inside or not (known and known.nodes)
    where = compressed(folder.job.get("hosts") or ()) if own or not known else known.nodes
    is_pending = state == "pending"
    return Status(
        name=name,
        path=path,
        state=state,
        job=folder.job_id or (str(folder.job["job_id"]) if folder.job.get("job_id") else None),
        attempt=folder.attempt.number if folder.attempt else None,
        step=max(reached, default=None),
        total=train.get("total_steps"),
        eta_s=eta_s,
        images_per_s=(train.get("summary") or {}).get("images_per_s") if state == "done" else rate,
        loss=row.get("train/loss"),
        nodes="" if is_pending else where,
        age_s=age_s,
        note=note,
        remedy=remedy,
        start=known.start.isoformat(timespec="minutes") if is_pending and known and known.start else None,
    )


def _of_slurm(folder: Folder, known: slurm.Job | None, silent: bool) -> str:
    """The state of a run that was sent to SLURM."""
    begun = folder.job.get("job_id") == folder.job_id  # else the newest attempt was of an earlier job
    recorded = folder.job.get("state") if begun else None
    trained = folder.train.get("state") if begun else None
    # A node's end is recorded as a stop or a failure, and SLURM starts the job again by itself.
    again = recorded in ("stopped", "failed") and known and known.state not in (*ENDED, "COMPLETING")
    if again and known and known.state not in WAITING and not _at_next_start(folder, known):
        again = False  # it is about to leave its nodes
    if not again and (recorded in FINAL or trained == "done"):
        return _final(folder, recorded)
    if silent:
        return "UNKNOWN"
    if known and known.state in WAITING:
        return "pending"
    if known and known.state not in ENDED:
        if not begun or again or recorded == "requeued" or _at_next_start(folder, known):
            return "starting"
        if folder.stop or trained == "stopped":
            return "stopping"
        return "suspended" if known.state == "SUSPENDED" else "running" if trained else "starting"
    if trained == "stopped" or (folder.stop.get("checkpoint") and not begun):
        return "stopped"
    if known is None:
        return "cancelled" if folder.stop else "gone"
    asked = folder.stop.get("checkpoint") is False  # of a step in an allocation, which ended well itself
    return "cancelled" if known.state == "CANCELLED" or asked else "failed"


def _final(folder: Folder, recorded: str | None) -> str:
    if recorded == "failed" and folder.stop.get("checkpoint") is False:
        return "cancelled"  # its trainers had no time to end in order
    return str(recorded if recorded in FINAL else "done")


def _at_next_start(folder: Folder, known: slurm.Job) -> bool:
    if known.start is None:
        return False
    return known.start.timestamp() > _seconds(folder.job) + NEXT_START_S


def _of_here(folder: Folder) -> str:
    """The state of a run on this machine, or on another one without SLURM."""
    recorded, trained = folder.job.get("state"), folder.train.get("state")
    if folder.attempt is None:
        return "new"
    if recorded in FINAL or trained == "done":
        return _final(folder, recorded)
    if folder.here:
        return "stopping" if folder.stop or trained == "stopped" else "running" if trained else "starting"
    if trained in FINAL:
        return str(trained)
    if folder.job.get("hosts") and socket.gethostname() not in folder.job["hosts"]:
        return "UNKNOWN"
    return "cancelled" if folder.stop else "gone"


def _note(folder: Folder, state: str, known: slurm.Job | None, now: datetime) -> tuple[str, str]:
    """(what there is to say of a run in this state, what can be done)."""
    train, job_id = folder.train, folder.job_id
    goes_on = "begins anew" if folder.saved is None else f"goes on from step {folder.saved}"
    match state:
        case "done":
            return _result(train.get("summary") or {}), ""
        case "pending":
            assert known
            before = f"{goes_on}; " if folder.attempt else ""
            return before + pending.told(known, now.replace(tzinfo=None)), pending.why(known.reason, known.id).remedy
        case "stopped":
            return goes_on, "resume"
        case "failed" | "refused":
            return _why_failed(folder, known)
        case "cancelled":
            return goes_on, "resume"
        case "gone" if job_id:
            return f"SLURM no longer knows job {job_id}, and it left no word of its end", "why"
        case "gone":
            return "its processes have gone without a word", "why"
        case "UNKNOWN" if job_id:
            phase = f"{train.get('state')} at step {train.get('step')}" if train else "not begun"
            return f"SLURM does not answer; last heard: {phase}", ""
        case "UNKNOWN":
            return f"runs, or ran, on {compressed(folder.job['hosts'])}: look there", ""
        case "stopping":
            return ("saves, then ends" if folder.stop.get("checkpoint", True) else "ends"), ""
        case _:
            return "", ""


def _why_failed(folder: Folder, known: slurm.Job | None) -> tuple[str, str]:
    if folder.job.get("job_id") != folder.job_id and folder.job_id:
        logs = f"see {folder.run.submitit}/{folder.job_id}_0_log.out"
        return f"ended before it began ({known.state if known else 'no word'})", logs
    cause = folder.job.get("cause") or folder.train.get("reason")
    if cause:
        text, remedy = why.split(str(cause))
        return text, remedy or "why"
    if known and known.state in _ENDS:
        return _ENDS[known.state], "resume"
    return (f"SLURM calls it {known.state}" if known else ""), "why"


_ENDS = {
    "TIMEOUT": "the time limit came before it could save",
    "NODE_FAIL": "a node failed, and SLURM did not start it again",
    "OUT_OF_MEMORY": "more memory was used than asked for",
    "PREEMPTED": "preempted, and not started again",
    "BOOT_FAIL": "a node did not boot",
}


def _result(summary: Mapping[str, Any]) -> str:
    top1 = summary.get("top1")
    return f"top-1 {100 * top1:.2f} %" if isinstance(top1, int | float) else ""


def compressed(hosts: Iterable[str]) -> str:
    """Names of nodes as SLURM writes them: node[1-3,7]."""
    groups: dict[tuple[str, str], list[str]] = {}
    for host in dict.fromkeys(hosts):  # simulated nodes are all this machine
        match = re.fullmatch(r"(.*?)(\d+)(\D*)", host)
        prefix, digits, suffix = match.groups() if match else (host, "", "")
        groups.setdefault((prefix, suffix), []).append(digits)
    return ",".join(f"{prefix}{_spans(numbers)}{suffix}" for (prefix, suffix), numbers in groups.items())


def _spans(numbers: Sequence[str]) -> str:
    """`["1", "2", "3", "7"]` -> `[1-3,7]`; leading zeros are kept."""
    if len(numbers) == 1:
        return numbers[0]
    padded = any(len(number) > 1 and number.startswith("0") for number in numbers)
    spans: list[list[tuple[int, int]]] = []  # runs of (width, number)
    for each in sorted({(len(number) if padded else 0, int(number or 0)) for number in numbers}):
        if spans and each == (spans[-1][-1][0], spans[-1][-1][1] + 1):
            spans[-1].append(each)
        else:
            spans.append([each])
    texts = []
    for span in spans:
        ends = [f"{number:0{width}d}" for width, number in (span[0], span[-1])]
        texts.append(ends[0] if len(span) == 1 else "-".join(ends))
    return f"[{','.join(texts)}]"


def age(seconds: float) -> str:
    """A length of time at a glance: 45s, 12m, 3h, 5d."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length * (2 if unit == "d" else 1):
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"


def wait_for(run: RunDir, over: Any, patience_s: float | None, every_s: float = 0.5) -> Status | None:
    """The state of a run as soon as `over(status)`; None if that is not so within `patience_s` (None: no limit)."""
    deadline = time.monotonic() + patience_s if patience_s is not None else float("inf")
    while True:
        _, status = read_one(run, 10.0)
        if over(status):
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(every_s)
