"""Where the figures of a run go: console, metrics.jsonl, the attempt's record, Weights & Biases, TensorBoard.

Rank 0 alone writes. metrics.jsonl is the truth: one line a row, written at once. W&B mirrors it from a thread of its
own. Nothing here ends or slows a training: what a full disk does not take is kept in memory and written, in order,
once there is room; what W&B does not take is told once and left out.
"""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from vitdist import rundir
from vitdist.board import Board
from vitdist.config import Config
from vitdist.console import FULL, Bar, forgiving
from vitdist.mirror import Mirror
from vitdist.rundir import Attempt, RunDir

MOST_EVENTS = 200
"""Events that an attempt's record holds; further ones are counted."""
MOST_KEPT = 10_000
"""Rows of one file that wait in memory for room: 10 to 20 MB, and a day of training at one row in 9 s."""
TOLD_AGAIN_S = 600.0
"""A disk that is full, free and full again within this time is not told of again."""
PATIENCE_S = 10.0
"""How long a record waits for another thread's write; after that the other one brings it to the disk with its own."""
RESERVE = 64 * 1024
"""Bytes held back on the disk for an attempt's last record, which decides whether the launcher starts it again."""

Publish = Callable[[Path, str | bytes], None]
"""As rundir.publish: put a whole file in its place."""


def _age_s() -> float:
    """Seconds since this process was started."""
    born = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - born


class Journal:
    """Rows, the attempt's record and the bar of one attempt; on ranks other than 0 every call does nothing.

    `record`, `event`, `warn` and `say` may be called from any thread. `event` and `warn` never wait for a write that
    another thread does, `record` no longer than PATIENCE_S, so that a watchdog is not held by a thread that hangs.
    """

    def __init__(self, run: RunDir, attempt: Attempt, first: bool) -> None:
        self._run, self._attempt, self._first = run, attempt, first
        self._record: dict[str, Any] = {"attempt": attempt.number, "state": "running", "started": rundir.now()}
        self._last: dict[str, float] = {}
        self._staged, self._stages = time.monotonic() - _age_s(), dict[str, float]()
        self._wandb: Mirror | None = None
        self._board: Board | None = None
        self._exit, self._step = rundir.EXIT_DONE, 0
        self._state, self._publishing = threading.Lock(), threading.RLock()
        self._changed = False
        self._told = -math.inf
        self._owed: dict[Path, str | bytes] = {}
        if first:
            self._bar = Bar(run.name)
            self._rows, self._bad = _Lines(run.metrics, self._full), _Lines(run.bad_samples, self._full)
            self._files = (self._rows, self._bad)
            self._room = attempt.path / ".room"
            for left in (run.path / "attempts").glob("*/.room"):  # of an attempt that was killed
                left.unlink(missing_ok=True)
            self.record(step=0, total_steps=None)
            try:
                rundir.publish(self._room, bytes(RESERVE))
            except OSError as error:
                self._full(attempt.path, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._first:
            return
        self._room.unlink(missing_ok=True)
        # The record comes before W&B has its say: torchrun kills a failed job's other ranks after 30 s.
        if isinstance(error, Exception):
            self.record(
                state="refused" if isinstance(error, ValueError) else "failed",
                reason=str(error).splitlines()[0] if str(error) else type(error).__name__,
                error={"type": type(error).__name__, "message": str(error), "rank": 0, "step": self._record["step"]},
                ended=rundir.now(),
            )
        else:
            self._publish_record()
        if self._wandb:
            # 75 makes a run that was marked as preempting "preempted" at W&B, 0 would make it "finished".
            code = self._exit if error is None else 1
            self._wandb.finish(code)
        if self._board:
            self._board.close()
        for file in self._files:
            file.flush()
        self._pay()
        self._bar.close()
        lost = sum(file.close() for file in self._files)
        names = [path.name for path in self._owed]
        if lost or names:
            what = ", ".join([*([f"{lost} rows"] if lost else []), *names])
            self._bar.print(f"warning: the disk is full to the end: {what} could not be written")

    def record(self, **changes: Any) -> None:
        """Publish the attempt's record with `changes` in it. On a full disk: as soon as there is room."""
        if self._first:
            with self._state:
                self._record |= changes
                self._step = self._record.get("step", 0)
            self._publish_record()

    def stage(self, name: str) -> None:
        """Note what a stage of the start took: since the last one, the first since this process began."""
        now = time.monotonic()
        self._stages[name] = round(now - self._staged, 2)
        self._staged = now

    def started(self) -> None:
        """Record and tell the stages, the longest first."""
        spent = dict(sorted(self._stages.items(), key=lambda item: -item[1]))
        self.record(startup_s=self._stages)
        told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent.items() if seconds >= 0.05)
        self.say(f"first update {sum(spent.values()):.1f} s after the start of the process: {told}")

    def event(self, kind: str, text: str) -> None:
        """Add {time, step, kind, text} to the attempt's record, under "events"."""
        if not self._first:
            return
        with self._state:
            events = self._record.setdefault("events", [])
            if len(events) < MOST_EVENTS:
                events.append({"time": rundir.now(), "step": self._step, "kind": kind, "text": text})
            else:
                self._record["events_left_out"] = self._record.get("events_left_out", 0) + 1
        self._publish_record(wait=False)

    def warn(self, kind: str, text: str) -> None:
        """`event`, and a line "warning: `text`" on the console."""
        self.say(f"warning: {text}")
        self.event(kind, text)

    def row(self, step: int, figures: dict[str, float]) -> None:
        """One row of figures at a step, everywhere."""
        if not self._first:
            return
        # JSON has no NaN or infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        row = {"attempt": self._attempt.number, "time": round(time.time(), 3), "train/global_step": step, **finite}
        self._rows.add([json.dumps(row)])
        self._last |= figures
        self._step = step
        self.progress(step, "training")
        if self._wandb:
            self._wandb.log({k: v for k, v in row.items() if k not in ("attempt", "time")})
        if self._board:
            self._board.add(step, figures)
        if self._changed:
            self._publish_record(wait=False)
        if self._owed:
            self._pay()

    def inputs(self, pictures: Sequence[dict[str, str]]) -> None:
        """Keep the first pictures of a run as the model got them, {"label", "jpeg": base64} of each."""
        if self._first:
            record = {"schema": rundir.SCHEMA, "pictures": pictures}
            self.publish(self._run.inputs, json.dumps(record, ensure_ascii=False))
            if self._wandb:
                self._wandb.inputs(pictures)

    def bad_samples(self, step: int, kind: str, samples: Sequence[NamedTuple]) -> None:
        """Note broken samples of the "train" or "val" set in the run's list of them."""
        if self._first and samples:
            about = {"attempt": self._attempt.number, "step": step, "set": kind}
            self._bad.add([json.dumps(about | sample._asdict(), ensure_ascii=False) for sample in samples])

    def publish(self, path: Path, content: str | bytes) -> None:
        """rundir.publish that a full disk cannot fail: the newest content for `path` is kept and written later."""
        if self._first:
            with self._publishing:
                self._owed.pop(path, None)
                self._try(path, content)

    def progress(self, step: int, phase: str) -> None:
        """Move the bar; `phase` says what goes on."""
        if self._first:
            last = self._last
            self._bar.update(
                step,
                self._record.get("total_steps") or 0,
                loss=last.get("train/loss"),
                images_per_s=last.get("perf/images_per_s"),
                eta_s=last.get("perf/eta_s"),
                phase=phase,
            )

    def say(self, text: str) -> None:
        """A line for the reader of the console."""
        if self._first:
            self._bar.print(text)

    def stopping(self) -> None:
        """The run is being stopped by a signal and will go on later: W&B shows it as preempted, not as finished."""
        self._exit = rundir.EXIT_STOPPED
        if self._wandb:
            self._wandb.preempting()

    # ---- a disk without room -------------------------------------------------------------------

    def _publish_record(self, wait: bool = True) -> None:
        self._changed = True
        # Who finds the lock taken leaves the work to its holder, who looks again after letting go.
        while (self._changed or wait) and self._publishing.acquire(timeout=PATIENCE_S if wait else 0):
            wait = False
            try:
                with self._state:
                    self._changed = False
                    text = json.dumps({"schema": rundir.SCHEMA, **self._record}, indent=1, ensure_ascii=False) + "\n"
                self._try(self._attempt.train, text)
            finally:
                self._publishing.release()

    def _try(self, path: Path, content: str | bytes) -> bool:
        """Publish, or owe it. Call with `_publishing` held."""
        try:
            rundir.publish(path, content)
        except OSError as error:
            self._owed[path] = content
            self._full(path, error)
            return False
        self._owed.pop(path, None)
        return True

    def _pay(self) -> None:
        """Publish what is owed; stops at the first file that there is no room for."""
        if not self._publishing.acquire(blocking=False):
            return
        try:
            owed = len(self._owed)
            if all(self._try(path, content) for path, content in list(self._owed.items())) and owed:
                self.event("disk_full", f"room on the disk again: {owed} files that were kept in memory are written")
        finally:
            self._publishing.release()

    def _full(self, path: Path, error: OSError | int) -> None:
        """Tell of a disk that takes nothing (an OSError; others are raised) or again takes rows (their number)."""
        if isinstance(error, int):
            self.event("disk_full", f"room on the disk again: {error} rows of {path.name} kept in memory are written")
            return
        if error.errno not in FULL:
            raise error
        now = time.monotonic()
        if now - self._told > TOLD_AGAIN_S:
            self._told = now
            self.warn(
                "disk_full",
                f"{path} cannot be written ({error.strerror}): what is logged is kept in memory until it can be",
            )
        self._told = now

    # ---- W&B, TensorBoard ----------------------------------------------------------------------

    def start_mirrors(self, settings: Config, about: dict[str, Any], step: int) -> None:
        """Begin or continue what else gets the rows, after `step` steps: W&B and TensorBoard, as the settings say.

        The id of the run in W&B is in the run folder, so that a requeue goes on with it. Returns when W&B is ready, has
        failed, or after mirror.START_S + GRACE_S seconds, whichever is first.
        """
        if self._first and settings.tracking.tensorboard:
            self._board = Board(self._run.tensorboard, step, lambda text: self.warn("tensorboard", text))
        if self._first and settings.tracking.wandb != "off":
            self._wandb = Mirror(self._run, settings, about, self.say, lambda text: self.warn("wandb", text))
            self._wandb.start()


class _Lines:
    """Lines added to a file, each whole: those that the disk does not take wait in memory, in their order.

    `tell` gets the path and an OSError that a write met, or the number of lines that were caught up with.
    """

    def __init__(self, path: Path, tell: Callable[[Path, OSError | int], None]) -> None:
        self._path, self._tell = path, tell
        self._handle: int | None = None
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        self._lock = threading.Lock()

    def add(self, lines: Sequence[str]) -> None:
        """Write `lines`, after those that wait."""
        with self._lock:
            self._waiting.extend(f"{line}\n".encode() for line in lines)
            self._write(new=len(lines))
            while len(self._waiting) > MOST_KEPT:
                self._waiting.popleft()
                self._lost += 1

    def flush(self) -> None:
        """Try once more to write what waits."""
        with self._lock:
            self._write(new=0)

    def close(self) -> int:
        """Returns how many lines never reached the file."""
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None
            return self._lost + len(self._waiting)

    def _write(self, new: int) -> None:
        behind = len(self._waiting) > new
        caught_up = len(self._waiting)
        while self._waiting:
            try:
                self._whole(self._waiting[0])
            except OSError as error:
                self._tell(self._path, error)
                return
            self._waiting.popleft()
        if behind:
            self._tell(self._path, caught_up)

    def _whole(self, line: bytes) -> None:
        """Add `line`; where only a part of it finds room, that part is cut off again."""
        if self._handle is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            _end_torn_line(self._handle)
        size = os.fstat(self._handle).st_size
        try:
            done = 0
            while done < len(line):
                done += os.write(self._handle, line[done:])
        except OSError:
            # A stale NFS handle stays stale: the next try opens the file anew.
            handle, self._handle = self._handle, None
            with contextlib.suppress(OSError):  # what cannot be cut off is ended by _end_torn_line
                os.ftruncate(handle, size)
            with contextlib.suppress(OSError):
                os.close(handle)
            raise


def _end_torn_line(handle: int) -> None:
    """A killed writer may leave half a line: end it, so that the next row stands alone. Raises OSError."""
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":
        os.write(handle, b"\n")


def to_file(path: Path) -> None:
    """Send this process's output, native libraries' included, to `path`; a full disk then loses lines, no run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    sys.stdout, sys.stderr = forgiving(1), forgiving(2)
