"""Why a rank ended, in the words of a catalogue: the record of each rank, and the root among them. Imports no torch.

    except Exception as error:
        fault = faults.of(error, rank, step, "training")   # classified by type, errno and message
        faults.note(attempt, fault)                        # attempts/K/faults/rank-R.json, whole or not at all

    found = faults.read(attempt)                           # anywhere, also on the login node
    first = faults.root(found)                             # the first that is no consequence of another's
    print(faults.line(first))

One rank's fault is every rank's end: the others lose their peer, and their words are louder than the cause. So a
fault is a root or a cascade, the distinction of NVIDIA's resiliency extension, whose words these are where it has one.
"""

import dataclasses
import errno
import json
import math
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitdist import rundir
from vitdist.rundir import Attempt

WORDS: dict[str, str] = {
    "configuration_validation_failure": "mend the setting or the input that the message names, then submit again",
    "artifact_or_path_not_found": "see that the path is right and that every node has it mounted",
    "filesystem_permission_denied": "give the user of the job the right to the path, on every node",
    "disk_full": "make room or raise the quota (bytes and files), then start the run again: it goes on from its last "
    "checkpoint",
    "storage_failure": "ask who keeps the storage; start the run again when it answers: it goes on from its last "
    "checkpoint",
    "too_many_open_files": "raise `ulimit -n` in the cluster's setup lines, or lower data.workers",
    "software_missing": "set up the environment again, the same on every node",
    "checkpoint_compatibility_mismatch": "use the settings that the run began with, or another run name",
    "checkpoint_damaged": "the message names what was passed over; begin a new run, or copy the checkpoint again",
    "superseded": "nothing: a newer start of this run goes on",
    "shape_mismatch": "the weights do not fit the model: see model.image_size and where the weights come from",
    "cuda_oom": "lower train.micro_batch, set model.gradient_checkpointing=true, or raise engine.zero",
    "out_of_memory": "ask for more memory (cluster file), or lower data.workers",
    "shared_memory_full": "make /dev/shm larger (in a container: --shm-size or --ipc=host), or lower data.workers",
    "gpu_failure": "leave this node out and tell its keepers; the run goes on from its last checkpoint",
    "port_in_use": "submit again: the next start takes another port",
    "nan_or_inf": "lower optim.lr, lengthen optim.warmup or set optim.clip; the last checkpoint is finite",
    "data_failure": "run `vitdist verify` on the shards that the message names",
    "hang": "read the stacks of the rank that is named; leave its node out if it happens there again",
    "collective_timeout": "a rank did not come in time: see the faults of the others, and their stacks",
    "peer_lost": "see why the other rank ended: this one only lost it",
    "killed": "SIGKILL is most often the kernel out of memory: ask for more, or lower data.workers",
    "user_cancelled": "nothing: it was asked for",
    "program_error": "a fault of vitdist: report it with the log of this rank",
    "framework_crash": "a fault in or below a library: the log of this rank has the whole traceback",
}
"""What ended a rank -> what to do, in one sentence."""
CASCADES = ("peer_lost", "collective_timeout")
"""Words of a rank that tells only of another one. A `hang` can be either."""

_PACKAGE = Path(__file__).resolve().parent
_OURS = f"{_PACKAGE}{os.sep}"
_STANDARD_LIBRARY = os.path.dirname(os.__file__)
_LARGEST = 1 << 20
"""Bytes of a record at most: a message has 500 characters."""


@dataclass(frozen=True)
class Fault:
    """What ended one rank."""

    rank: int
    host: str
    """Empty where another rank tells of one that could not, and does not know it."""
    step: int
    phase: str
    time: float
    """Unix seconds, by the clock of that host."""
    word: str
    """One of WORDS."""
    cascade: bool
    """Whether it only tells of another rank's end."""
    type: str
    """Of the exception."""
    message: str
    where: str
    """The last frame of our own code, as `vitdist/train.py:123 in _update`; empty if there was none."""


# What a rank says when another one has gone or does not come: gloo, NCCL, TCPStore, torch's own.
_PEER_LATE = re.compile(
    r"(?i)timed out waiting|timeout caused pair closure|socket (timeout|has timed out)|wait timeout after"
    r"|collective operation timeout|clients joined"
)
_PEER_GONE = re.compile(
    r"(?i)connection (was )?(likely )?(closed|reset|refused)|broken pipe|pair closure|remote process exited"
    r"|socket closed|failed to recv, got 0 bytes|NCCL error"
)

# Names, since the classes lie behind torch and in rooms that are not to be reached from here.
_TYPES = {
    "KeyboardInterrupt": "user_cancelled",
    "MemoryError": "out_of_memory",
    "OutOfMemoryError": "cuda_oom",
    "AcceleratorError": "gpu_failure",
    "ImportError": "software_missing",
    "Diverged": "nan_or_inf",
    "DataFailed": "data_failure",
    "Damaged": "checkpoint_damaged",
    "NoCheckpoint": "checkpoint_damaged",
    "UnpicklingError": "checkpoint_damaged",
    "Fenced": "superseded",
}
_NUMBERS = {
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.EFBIG: "disk_full",
    errno.EACCES: "filesystem_permission_denied",
    errno.EPERM: "filesystem_permission_denied",
    errno.EROFS: "filesystem_permission_denied",
    errno.ENOENT: "artifact_or_path_not_found",
    errno.ENOTDIR: "artifact_or_path_not_found",
    errno.EMFILE: "too_many_open_files",
    errno.ENFILE: "too_many_open_files",
    errno.ENOMEM: "out_of_memory",
    errno.EADDRINUSE: "port_in_use",
}
# Tried in this order on "type: message". The words are those of libc, torch, DeepSpeed and this project's own errors.
_TEXTS = [
    (word, re.compile(pattern))
    for word, pattern in (
        ("disk_full", r"(?i)no space left|disk quota exceeded|the disk is full"),
        ("shared_memory_full", r"(?i)bus error.*shared memory|insufficient shared memory"),
        ("cuda_oom", r"(?i)CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED"),
        ("out_of_memory", r"(?i)can't allocate memory|cannot allocate memory|killed by signal: killed"),
        ("too_many_open_files", r"(?i)too many open files"),
        ("port_in_use", r"(?i)address already in use|EADDRINUSE"),
        ("checkpoint_compatibility_mismatch", r"cannot be continued: "),
        ("shape_mismatch", r"size mismatch for |shapes cannot be multiplied|must match the size of tensor"),
        ("checkpoint_damaged", r"PytorchStreamReader failed|invalid load key"),
        ("gpu_failure", r"(?i)CUDA error|device-side assert|uncorrectable ECC|CUDNN_STATUS_|CUBLAS_STATUS_"),
        ("nan_or_inf", r"(?i)not finite|loss is (nan|-?inf)|loss scale already at minimum"),
        ("data_failure", r"samples could not be used|DataLoader worker .* exited unexpectedly"),
        ("filesystem_permission_denied", r"(?i)permission denied|read-only file system|operation not permitted"),
        ("storage_failure", r"(?i)input/output error|stale file handle|transport endpoint|remote i/o error"),
        ("artifact_or_path_not_found", r"(?i)no such file|no such (folder|shard)"),
    )
]


def peer_gone(text: str) -> bool:
    """Whether a line of a log, or a message, tells of another rank's end or absence."""
    return bool(_PEER_LATE.search(text) or _PEER_GONE.search(text))


def of(error: BaseException, rank: int, step: int, phase: str) -> Fault:
    """The fault of `rank`, which ends with `error` on this host at this moment, in `phase` of update `step`."""
    told, context = _told(error), error.__context__
    while told in CASCADES and context and not error.__cause__ and not error.__suppress_context__:
        # Something failed, and then, while this rank was leaving, a collective did: it tells of us, not of a peer.
        error, told, context = context, _told(context), context.__context__
    word, at_fault = _word(error)
    return Fault(
        rank=rank,
        host=socket.gethostname(),
        step=step,
        phase=phase,
        time=time.time(),
        word=word,
        cascade=word in CASCADES,
        type=type(error).__name__,
        message=one_line(str(error)),
        where=_where(at_fault) or _where(error),
    )


def _word(error: BaseException) -> tuple[str, BaseException]:
    """(word, the exception of the chain that it was read from); the outermost that tells is believed."""
    for each in _chain(error):
        if word := _told(each):
            return word, each
    if isinstance(error, ValueError):  # before the loop it is bad input; in the loop the trainer wraps it
        return "configuration_validation_failure", error
    origin = list(_chain(error))[-1]
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(origin.__traceback__)]
    ours = bool(frames) and frames[-1].startswith(_OURS)
    return ("program_error" if ours else "framework_crash"), origin


def _told(error: BaseException) -> str | None:
    """The word of one exception by itself, or None where it tells nothing particular."""
    for kind in type(error).__mro__:
        if word := _TYPES.get(kind.__name__):
            return word
    if isinstance(error, OSError) and error.errno is not None:
        return _NUMBERS.get(error.errno, "storage_failure")
    text = f"{type(error).__name__}: {error}"
    if word := next((word for word, pattern in _TEXTS if pattern.search(text)), None):
        return word
    if isinstance(error, RuntimeError):  # of which torch's DistError is one
        if _PEER_LATE.search(text):
            return "collective_timeout"
        if _PEER_GONE.search(text):
            return "peer_lost"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and what led to it, outermost first; also what `from None` keeps from being printed."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _where(error: BaseException) -> str:
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    places = (place(code.co_filename, line, code.co_name) for code, line in reversed(frames))
    return next(filter(None, places), "")


def place(file: str, line: int, function: str) -> str:
    """`vitdist/train.py:123 in _update` if that file is ours or the user's, "" for Python's and the libraries'."""
    theirs = file.startswith(("<", _STANDARD_LIBRARY)) or "site-packages" in file or "dist-packages" in file
    if theirs and not file.startswith(_OURS):
        return ""
    return f"{file.removeprefix(_OURS.removesuffix(_PACKAGE.name + os.sep))}:{line} in {function}"


def note(attempt: Attempt, fault: Fault) -> None:
    """Publish the fault in its rank's place, unless one stands there: what came first led to the rest.

    Never raises for the disk's sake: the record is about another fault, which must not be hidden by this one.
    """
    path = attempt.fault(fault.rank)
    try:
        if not path.exists():
            rundir.publish_json(path, dataclasses.asdict(fault))
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}): {line(fault)}", file=sys.stderr, flush=True)


def read(attempt: Attempt) -> list[Fault]:
    """What the ranks of an attempt have noted, by rank; a file that is no such record is named on stderr, no more."""
    found = []
    for path in sorted((attempt.path / "faults").glob("rank-*.json")):
        try:
            found.append(_parsed(path))
        except (OSError, ValueError, OverflowError, RecursionError) as error:
            reason = one_line(str(error) or type(error).__name__)
            print(f"{path} is no record of a fault and is left out ({reason})", file=sys.stderr)
    return sorted(found, key=lambda fault: fault.rank)


def _parsed(path: Path) -> Fault:
    """The record at `path`. Raises ValueError, or what JSON's parser and numbers raise, for what is none."""
    with open(path, "rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"larger than {_LARGEST:,} bytes")
    record = json.loads(content)
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    schema = record.get("schema")
    if not isinstance(schema, int) or schema > rundir.SCHEMA:
        raise ValueError(f"schema {schema!r}, this vitdist reads {rundir.SCHEMA}")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Fault):
        value = record.get(field.name)
        if field.type is float and type(value) is int:
            value = float(value)
        if type(value) is not field.type or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{field.name} is {value!r:.40}")
        values[field.name] = value
    return Fault(**values)


def root(faults: Sequence[Fault]) -> Fault | None:
    """The first fault that is no consequence of another rank's; None if all are, or there are none."""
    roots = [fault for fault in faults if not fault.cascade]
    return min(roots, key=lambda fault: (fault.time, fault.rank)) if roots else None


def line(fault: Fault) -> str:
    """A line for people: what happened, to whom, where in the run, and what to do."""
    host = f" on {fault.host}" if fault.host else ""
    at = f" at {fault.where}" if fault.where else ""
    remedy = f"; {WORDS[fault.word]}" if fault.word in WORDS else ""
    text = f"{fault.word}, rank {fault.rank}{host}, step {fault.step}, {fault.phase}: {fault.type}: {fault.message}"
    return one_line(f"{text}{at}{remedy}", 2000)


def one_line(text: str, length: int = 500) -> str:
    """`text` in one line of at most `length` characters, without what would steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:length]
