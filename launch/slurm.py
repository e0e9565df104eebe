"""What SLURM says: its partitions and nodes, the state of a job. Each question is bounded; silence is no answer.

there = partitions(10.0)        # None: no SLURM, or none that answers
state("4711")                   # "PENDING (Priority)", "GONE", or "UNKNOWN" where it is silent
jobs(["4711", "4712_3"], 10)    # all in one question; None where it is silent
"""

import contextlib
import difflib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from vitdist.rundir import RunDir

# ---- time limits ---------------------------------------------------------------------------------

_CLOCK = re.compile(r"(?:(?P<days>\d{1,9})-)?(?P<clock>\d{1,9}(?::[0-5]?\d){0,2})", re.ASCII)
LONGEST_MINUTES = 10 * 365 * 24 * 60
"""Ten years: beyond what a site can mean, and within SLURM's 32 bits."""


def minutes(time: int | str) -> int:
    """A time limit in minutes, seconds rounded up. Raises ValueError.

    SLURM's forms: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S.
    """
    match = _CLOCK.fullmatch(str(time))
    parts = [int(part) for part in match["clock"].split(":")] if match else []
    if match and match["days"]:
        parts = [24 * int(match["days"]) + parts[0], *parts[1:], 0, 0][:3]
    elif len(parts) < 3:
        parts = [0, *parts, 0, 0][:3]
    hours, mins, seconds = parts
    total = hours * 60 + mins + -(-seconds // 60)
    if not 1 <= total <= LONGEST_MINUTES:
        shown = str(time) if len(str(time)) <= 40 else f"{str(time)[:40]}..."
        raise ValueError(f"time {shown!r}: write minutes (720), HH:MM:SS (12:00:00) or D-HH:MM:SS (2-00:00:00)")
    return total


# ---- what there is -------------------------------------------------------------------------------


class Nodes(NamedTuple):
    """Some nodes of a partition that are alike."""

    number: int
    cpus: int
    gpus: int
    minutes: int | None
    """Longest job of the partition; None: no limit."""
    gpu_types: tuple[str, ...] = ()
    """Types of their GPUs, sorted, where SLURM names them."""


@dataclass(frozen=True)
class Slurm:
    """What SLURM says of itself."""

    partitions: Mapping[str, list[Nodes]] = field(default_factory=dict)
    default: str | None = None

    def nodes(self, partition: str | None) -> list[Nodes]:
        """Those of a partition; of several (commas) the first that exists; [] for an unknown one."""
        names = partition.split(",") if partition else [self.default or ""]
        return next((self.partitions[name] for name in names if name in self.partitions), [])

    def missing(self, partition: str | None) -> list[str]:
        return [name for name in (partition or "").split(",") if name and name not in self.partitions]

    def near(self, name: str) -> str:
        """A hint at the partition that was meant."""
        close = difflib.get_close_matches(name, self.partitions, 1)
        return f"did you mean {close[0]}?" if close else f"there are: {', '.join(sorted(self.partitions))}"


def partitions(patience_s: float) -> Slurm | None:
    """Its partitions and nodes; None where there is no SLURM, or none that answers in time."""
    if not shutil.which("sbatch"):
        return None
    # %P partition (* marks the default), %D nodes, %c cores, %G GPUs, %l longest job
    answer = ask(["sinfo", "-h", "-a", "-o", "%P|%D|%c|%G|%l"], patience_s)
    return None if answer is None else _read_sinfo(answer)


def ask(command: list[str], patience_s: float) -> str | None:
    """The output of a SLURM command; None if it fails, is missing or says nothing in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience_s, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


# gpu:8, gpu:a100:4(S:0-1), and others such as craynetwork:1 between
_GPUS = re.compile(r"(?:^|,)gpu(?::([^:,]+))?:(\d+)(?=,|$)")


def gpus(gres: str) -> tuple[int, tuple[str, ...]]:
    """(how many, their types) of what SLURM calls Gres: `gpu:a100:4(S:0-1),craynetwork:1` has 4 of a100."""
    found = _GPUS.findall(re.sub(r"\([^)]*\)", "", gres))
    return sum(int(number) for _, number in found), tuple(sorted({kind for kind, _ in found if kind}))


def _read_sinfo(text: str) -> Slurm:
    partitions: dict[str, list[Nodes]] = {}
    default = None
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) != 5:  # a line of a site's wrapper around sinfo
            continue
        name, count, cpus, gres, limit = parts
        if name.endswith("*"):
            name = default = name.removesuffix("*")
        number, types = gpus(gres)
        # "32+": some of them have more
        longest = minutes(limit) if _CLOCK.fullmatch(limit) else None
        partitions.setdefault(name, []).append(Nodes(int(count), int(cpus.rstrip("+")), number, longest, types))
    return Slurm(partitions, default)


# ---- jobs ----------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What squeue says of a job."""

    id: str
    """`123`, or `123_4` for one of an array."""
    state: str
    """SLURM's word, such as PENDING."""
    reason: str
    """Why it waits, in SLURM's word; "" if it says none."""
    nodes: str
    """Where it runs, such as `node[1-4]`; "" before."""
    start: datetime | None
    """When it began, or is expected to begin, in local time; None: SLURM does not say."""


# The user's own habits would hide jobs, which then looked gone, or write times in another way.
_PLAIN = (
    "env",
    *(f"-uSQUEUE_{name}" for name in ("ACCOUNT", "LICENSES", "NAMES", "PARTITION", "QOS", "STATES", "USERS")),
    "SLURM_TIME_FORMAT=standard",
)


def job_of(run: RunDir) -> str | None:
    """The id of a run's newest job in SLURM, `123` or `123_4`; None if it was never sent there."""
    try:
        return (run.path / "slurm_job").read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:  # submitit's files tell too, but not which point of a sweep this is
        ids = [int(path.name.split("_")[0]) for path in run.submitit.glob("[0-9]*_submission.sh")]
        return str(max(ids)) if ids else None


def jobs(ids: Iterable[str], patience_s: float) -> dict[str, Job] | None:
    """Those of the jobs `ids` that SLURM knows, in one question; None where it is silent."""
    wanted = {job_id.split("_")[0] for job_id in ids}
    if not wanted:
        return {}
    # -r: a line for each job of an array
    command = [*_PLAIN, "squeue", "-h", "-a", "-r", "-t", "all", "-o", "%i|%T|%r|%N|%S", "-j", ",".join(sorted(wanted))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience_s, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:  # asked for one job alone, squeue fails where it does not know it
        return {} if "Invalid job id" in done.stderr else None
    lines = done.stdout.splitlines()
    found = {job.id: job for job in filter(None, map(_read_job, lines))}
    return found if found or not lines else None  # what cannot be read is no answer


def _read_job(line: str) -> Job | None:
    job_id, *rest = line.strip().split("|")
    if len(rest) != 4:
        return None
    state, reason, nodes, start = rest
    try:
        at = datetime.fromisoformat(start)
    except ValueError:  # N/A
        at = None
    return Job(job_id, state, "" if reason == "None" else reason, nodes, at)


def state(job_id: str) -> str:
    """`STATE (reason)` of a job; "UNKNOWN" where SLURM is silent, "GONE" where it says that it knows no such job."""
    command = [*_PLAIN, "squeue", "-h", "-a", "-t", "all", "-j", job_id, "-o", "%T|%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return "UNKNOWN"
    if done.returncode:
        return "GONE" if "Invalid job id" in done.stderr else "UNKNOWN"
    word, _, reason = done.stdout.strip().partition("|")
    if not word:
        return "GONE"
    return word if reason in ("", "None") else f"{word} ({reason})"


# What may be otherwise in an hour; all else that SLURM says of a script stays wrong.
_FOR_NOW = re.compile(
    r"busy|not available now|down, drained|unable to contact|timed out|temporar|communication|slurmctld", re.IGNORECASE
)


def test_only(  # named as sbatch's flag; no test
    script: str,
    patience_s: float = 10.0,  # noqa: PT028
    env: Mapping[str, str] | None = None,  # noqa: PT028
    flags: Sequence[str] = (),  # noqa: PT028
) -> tuple[bool | None, str]:
    """Whether SLURM would take a script, by `sbatch --test-only`, and its words: the estimated start, or the fault.

    None: it is silent, or cannot start the job at the moment. `env`: without what a surrounding job has left there.
    `flags`: of sbatch, before those of the script.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--test-only", *flags],
            input=script,
            capture_output=True,
            text=True,
            timeout=patience_s,
            env=env,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None, "SLURM does not answer (sbatch --test-only)"
    # Its answer stands on stderr; lua plugins of a site add lines of their own.
    said = " ".join(f"{done.stderr}\n{done.stdout}".split())
    if done.returncode == 0:
        return True, said
    later = done.returncode < 0 or _FOR_NOW.search(said)  # or a signal has ended it
    return (None if later else False), said or f"sbatch: exit code {done.returncode}"


def starts(said: str) -> str | None:
    """The time at which a job would start, from the words of `test_only`; None where they hold none."""
    found = re.search(r"to start at (\d{4}-\d\d-\d\dT[\d:]+)", said)
    return found[1] if found else None


def address(host: str) -> str | None:
    """The address that SLURM has of a node; None where it does not say, or says the name again."""
    found = re.search(r"\bNodeAddr=(\S+)", ask(["scontrol", "show", "node", host, "-o"], 30) or "")
    return found[1] if found and found[1] != host else None


def end_time(job_id: str) -> float | None:
    """When a job will be ended by its limit, in Unix seconds; None where SLURM does not say."""
    with contextlib.suppress(ValueError):  # "N/A", NOT_SET
        said = (ask([*_PLAIN, "squeue", "-h", "-a", "-j", job_id, "-o", "%e"], 10) or "").strip()
        return datetime.fromisoformat(said).timestamp()
    return None


def requeue(job_id: str, patience_s: float = 300.0) -> str | None:
    """Have a job started again; returns why SLURM would not, or None. It kills the job's processes for it.

    A controller that does not answer, as it does while it is started anew, is asked again for `patience_s` seconds.
    """
    deadline = time.monotonic() + patience_s
    while (error := _told(["scontrol", "requeue", job_id], 60)) and _FOR_NOW.search(error):
        if time.monotonic() > deadline:
            break
        time.sleep(5)
    return error


def hostnames(nodes: str) -> list[str]:
    """`node[1-3,7]` one by one; [] where SLURM does not say."""
    return (ask(["scontrol", "show", "hostnames", nodes], 10) or "").split()


def exclude(job_id: str, nodes: Sequence[str]) -> str | None:
    """Leave `nodes` out of a job that was requeued; returns why SLURM would not, or None.

    It refuses that for a job that runs, and for a moment after the requeue too (22.05).
    """
    command = ["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}"]
    deadline = time.monotonic() + 8  # within KillWait, 30 s by default: then this process is gone
    while (error := _told(command, 5)) and time.monotonic() < deadline:
        time.sleep(0.3)
    return error


def _told(command: list[str], patience_s: float) -> str | None:
    """What was wrong with a command, in one line; None if nothing."""
    try:
        # Its own requeue has SLURM end it, before it can say that it was done.
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=patience_s, stdin=subprocess.DEVNULL, preexec_fn=_deaf
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error.strerror if isinstance(error, OSError) else 'no answer'}"
    return (" ".join(done.stderr.split()) or f"exit code {done.returncode}") if done.returncode else None


def _deaf() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
