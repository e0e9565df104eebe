"""The run folder: the contract of launcher and trainer, and the only memory of a run. Imports no torch.

    runs/NAME/
      config.yaml               every setting, resolved
      cluster.yaml submit.sh    where it was sent and the exact script
      env.json                  versions, commit, host, command (schema version inside)
      code/ patch.diff          the code that runs; what of it was not committed
      attempts/K/job.json       the launcher's record of start K   (one writer: the first node's job)
      attempts/K/train.json     the trainer's record of start K    (one writer: rank 0)
      attempts/K/logs/node-N/   torchrun.log, rank-R.log; check.json: its state before training; node.json: how it ended
                                (one writer: that node's job)
      attempts/K/faults/        rank-R.json: what ended that rank (one writer: the rank; a peer for one that hangs)
      attempts/K/stacks/        rank-R.txt, rank-R.json: where that rank stood when the attempt hung
      checkpoints/step-S/       appears whole; manifest.json says what is in it
      stop.json                 the user's wish that it stops   (one writer: launch/jobs.py)
      metrics.jsonl             one row every few steps, the truth that W&B mirrors
      evaluation.json predictions.npz    the newest evaluation
      inputs.json               the first pictures as the model got them, with their labels
      bad_samples.jsonl         every broken sample that was met: step, set, shard, key, reason
      wandb/ tensorboard/ model/ report.html

A file that another process reads is published: written beside its place, synced, renamed.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

SCHEMA = 1

# What a trainer's exit tells the launcher. 75 is EX_TEMPFAIL of sysexits.h; 93 is the number that
# NVIDIA's resiliency extension uses for "do not requeue".
EXIT_DONE = 0
EXIT_REFUSED = 2
EXIT_STOPPED = 75
EXIT_DO_NOT_REQUEUE = 93

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Attempt:
    """One start of a run: a requeue is the next attempt."""

    path: Path

    @property
    def number(self) -> int:
        return int(self.path.name)

    @property
    def job(self) -> Path:
        return self.path / "job.json"

    @property
    def train(self) -> Path:
        return self.path / "train.json"

    def fault(self, rank: int) -> Path:
        return self.path / "faults" / f"rank-{rank}.json"

    def stacks(self, rank: int) -> Path:
        return self.path / "stacks" / f"rank-{rank}.txt"

    def torchrun_log(self, node: int) -> Path:
        return self.path / "logs" / f"node-{node}" / "torchrun.log"

    def node(self, node: int) -> Path:
        return self.path / "logs" / f"node-{node}" / "node.json"

    def check(self, node: int) -> Path:
        return self.path / "logs" / f"node-{node}" / "check.json"

    def rank_log(self, node: int, rank: int) -> Path:
        return self.path / "logs" / f"node-{node}" / f"rank-{rank}.log"


@dataclass(frozen=True)
class RunDir:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def cluster(self) -> Path:
        return self.path / "cluster.yaml"

    @property
    def submit(self) -> Path:
        return self.path / "submit.sh"

    @property
    def env(self) -> Path:
        return self.path / "env.json"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def patch(self) -> Path:
        return self.path / "patch.diff"

    @property
    def submitit(self) -> Path:
        """Pickles and node logs of submitit; mode 0700, since a pickle is code."""
        return self.path / "submitit"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def stop(self) -> Path:
        """The user's wish that the run stops for good, after a checkpoint."""
        return self.path / "stop.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def bad_samples(self) -> Path:
        return self.path / "bad_samples.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.npz"

    @property
    def inputs(self) -> Path:
        return self.path / "inputs.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def wandb_id(self) -> str | None:
        """The run's name at W&B; None where there is none yet, or none that can be read."""
        try:
            name = (self.wandb / "run-id").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
        return name if re.fullmatch(r"[0-9a-z_-]{1,64}", name) else None

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def attempt(self, number: int) -> Attempt:
        return Attempt(self.path / "attempts" / str(number))

    def attempts(self) -> list[Attempt]:
        """Every start so far, oldest first."""
        folder = self.path / "attempts"
        numbers = (p.name for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else ()
        return [self.attempt(n) for n in sorted(map(int, numbers))]

    def next_attempt(self) -> int:
        attempts = self.attempts()
        return attempts[-1].number + 1 if attempts else 0


def check_name(name: str) -> str:
    """`name` if it can be a folder's and a job's name on every system. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"run name {name!r}: use 1 to 100 letters, digits, '.', '_' and '-', the first a letter or digit"
        )
    return name


def now() -> str:
    """UTC, to the second, as records hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def publish(path: Path, content: str | bytes) -> None:
    """Make `path` hold `content`, whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp gives 0600, which hides a run from the group
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is at `path` whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None  # `write` does not say where
        raise
    sync_folder(path.parent)


def publish_json(path: Path, record: dict[str, Any]) -> None:
    """Publish `record` with the schema version in it."""
    publish(path, json.dumps({"schema": SCHEMA, **record}, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The record at `path`, or None if none was published. Raises ValueError for a damaged or a newer one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(f"{path}: is damaged ({error.msg})", error.doc, error.pos) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is damaged ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("schema", 0), int):
        raise ValueError(f"{path}: holds no record")
    if record.get("schema", 0) > SCHEMA:
        raise ValueError(f"{path}: written by a newer vitdist (schema {record['schema']}, this one reads {SCHEMA})")
    return record


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last: POSIX promises them only after an fsync of the folder."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """Make what was written to `path` last."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def only_writer(run: RunDir) -> Iterator[None]:
    """Hold the run while this process trains it. Raises BlockingIOError if another one does.

    A lock of the kernel: it goes with the process that holds it and the loaders that it forked, which end
    within seconds of it, so no stale one can remain. Where the
    file system has none (Lustre mounted without `flock`), that is said and the run goes on without.
    """
    with open(run.path / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            print(f"{run.path}: no file locks here ({error.strerror}); see that nobody else trains it", file=sys.stderr)
        yield


def rows(run: RunDir) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in the order of steps; of steps done twice (after a resume) the newest."""
    if not run.metrics.exists():
        return []
    kept: dict[tuple[int, bool], dict[str, Any]] = {}
    first_of_attempt: dict[int, int] = {}
    for line in run.metrics.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a killed writer left half-written
        step, attempt = row["train/global_step"], row["attempt"]
        if "val/loss" not in row:  # an evaluation that was owed is of the step that the attempt goes on from
            first_of_attempt.setdefault(attempt, step)
        kept[step, "val/loss" in row] = row
    for (step, kind), row in list(kept.items()):
        if any(a > row["attempt"] and step >= first for a, first in first_of_attempt.items()):
            del kept[step, kind]
    return [kept[key] for key in sorted(kept)]


def state(run: RunDir) -> dict[str, Any]:
    """What the records say of a run now: the newest attempt's trainer record, or `{"state": "submitted"}`."""
    for attempt in reversed(run.attempts()):
        record = read_json(attempt.train)
        if record:
            return record
    return {"state": "submitted"}
