"""Sees that a rank goes on: after too long without progress it leaves all stacks in the run folder and ends. No torch.

    with Watchdog(attempt, rank, world, limit_s=600, on_hang=publish) as watchdog:
        watchdog.mark(step, "training")                    # at every micro-batch, evaluation batch and phase
        watchdog.mark(step, "exporting", limit_s=3600)     # holds until the next mark

All ranks mark alike: the same phases in the same order, also those in which one works and the others wait for it. Then
the rank with the fewest marks is the one that the others wait for.

A rank that marks nothing for its limit writes the stacks of all its threads and its progress to the run folder, gives
the other ranks a moment to do the same, says who is to blame, and ends with `os._exit`: a collective operation cannot
be interrupted, and its ranks cannot be asked to agree.

Two threads and a timer, since each may meet what hangs the run. The first thread only counts and touches no file, so
that storage that hangs does not hang it. The second does what needs files, in a bounded time. The timer is the kernel's
(SIGALRM): faulthandler's handler, in C, writes the main thread's stack also while some extension, or a regular
expression, holds the interpreter's lock. Its own thread for that (`dump_traceback_later`) would be there at forks,
whose children then wait for its locks at their end for ever, and it reads the stacks of threads that may be running.

Time is what the first thread has lived through, in its own short sleeps: a process that was stopped as a whole
(SIGSTOP, a suspended machine) and goes on is not taken for hung.
"""

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

from vitdist import faults, rundir
from vitdist.faults import Fault
from vitdist.rundir import Attempt

TICKS = 20
"""A limit is counted in so many sleeps; one is at most LONGEST_TICK_S."""
LONGEST_TICK_S = 1.0
GRACE_S = (2.0, 30.0)
"""At least and at most, for the files of other ranks; in between a tenth of the limit. NFS shows new files of another
node after up to 30 s (acdirmin), and ranks that hang began to wait up to a step apart."""
LISTEN_AFTER_S = 5.0
"""Without a mark for so long, a rank looks whether others call for stacks; no step of a healthy run gets there."""
REPORT_S = 30.0
"""For all the rest that needs files. Then the process ends without."""
_DEBUGGERS = ("bdb", "pdb", "pydevd", "debugpy", "_pydevd_bundle")
_COLLECTIVES = re.compile(r"torch/distributed/|deepspeed/comm/")
_PROGRESS = {
    "rank": int,
    "host": str,
    "step": int,
    "phase": str,
    "marks": int,
    "seconds": float,
    "limit_s": float,
    "where": str,
    "in_collective": bool,
}
_HEAD = re.compile(r"rank \d+ on (?P<host>\S+), process \d+; ")
_STACK = "Stack (most recent call first):\n"
"""What faulthandler writes above the stack of one thread alone."""
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$', re.MULTILINE)


class Mark(NamedTuple):
    """The newest sign of progress."""

    number: int
    step: int
    phase: str
    limit_s: float


class Watchdog:
    """Watches this process from entering to leaving; `mark` says that it goes on."""

    def __init__(
        self,
        attempt: Attempt,
        rank: int,
        world: int,
        limit_s: float,
        on_hang: Callable[[str], None] | None = None,
        grace_s: float | None = None,
    ) -> None:
        """`limit_s`: the longest time without a mark, in seconds; infinity watches nothing. `on_hang(verdict)` is
        called once, in a thread, before the process ends. `grace_s`: for the files of other ranks; default GRACE_S.

        Raises ValueError for a limit that is not above 0.
        """
        if not limit_s > 0:
            raise ValueError(f"a time without progress must be above 0 s, not {limit_s}")
        self._attempt, self._rank, self._world, self._limit_s, self._on_hang = attempt, rank, world, limit_s, on_hang
        least, most = GRACE_S
        self._grace_s = min(max(least, limit_s / 10), most) if grace_s is None else grace_s
        self._tick_s = min(LONGEST_TICK_S, limit_s / TICKS)
        self._mark = Mark(0, 0, "starting", limit_s)
        self._waited = 0.0
        self._ended, self._hung = threading.Event(), threading.Event()
        self._dumping = threading.Lock()
        self._main = threading.main_thread()
        self._stacks = attempt.stacks(rank)
        self._file: Any = sys.__stderr__
        self._stale = False
        """Whether faulthandler may have written a stack though this process only stood still."""

    def mark(self, step: int, phase: str, limit_s: float | None = None) -> None:
        """This rank goes on, in `phase` of update `step`. `limit_s`: until the next mark; default: the watchdog's."""
        # One store, so that the other thread never sees half a mark.
        self._mark = Mark(self._mark.number + 1, step, phase, limit_s or self._limit_s)

    @property
    def newest(self) -> Mark:
        """The newest sign of progress."""
        return self._mark

    def __enter__(self) -> Self:
        try:
            # Opened now: when it is needed, the storage may hang and the interpreter's lock be taken.
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._stacks, "w+", encoding="utf-8")
            self._head()
        except OSError as error:
            self._file = sys.__stderr__
            print(f"{self._stacks} cannot be written ({error.strerror}): stacks go to stderr", file=sys.stderr)
        faulthandler.register(signal.SIGALRM, file=self._file, all_threads=False)
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watcher.start()
        threading.Thread(target=self._listen, name="watchdog, called by others", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        # When the first rank ends itself, the others wake up with an error: what they are about to say is said first.
        self._watcher.join(self._grace_s + REPORT_S + 5 if self._hung.is_set() else 5)
        signal.setitimer(signal.ITIMER_REAL, 0)
        # Unregistered, a signal that is under way would end the process; and another file may get this one's number.
        faulthandler.register(signal.SIGALRM, file=2, all_threads=False)
        if self._file is not sys.__stderr__ and self._dumping.acquire(timeout=5):
            with contextlib.suppress(OSError):  # of a disk that is full by now
                self._file.close()
                if not self._progress_file(self._rank).exists():  # nobody asked for them
                    self._stacks.unlink()
            self._dumping.release()

    # ---- the first thread: counts -------------------------------------------------------------------

    def _watch(self) -> None:
        seen = self._mark
        while True:
            armed_s = self._arm(seen)
            before = time.monotonic()
            if self._ended.wait(self._tick_s):
                return
            slept = time.monotonic() - before
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._stale = self._stale or slept >= armed_s  # it lives by the clock
            mark = self._mark
            if mark is not seen:
                seen, self._waited = mark, 0.0
                continue
            self._waited += min(slept, 2 * self._tick_s)
            if self._waited >= mark.limit_s:
                if self._debugged():
                    self._waited = 0.0
                    continue
                break
        self._hung.set()
        report = threading.Thread(target=self._report, args=(mark,), name="watchdog, report", daemon=True)
        report.start()
        report.join(self._grace_s + REPORT_S)
        if report.is_alive():
            # In a thread again: stderr may be a file that hangs too.
            text = f"no progress for {self._waited:.0f} s, and the run folder does not answer: ended without stacks"
            last = threading.Thread(target=self._say, args=(text,), daemon=True)
            last.start()
            last.join(1)
        os._exit(1)

    def _arm(self, mark: Mark) -> float:
        """For the case that this thread will not get the interpreter's lock back; returns when, in seconds."""
        left = max(mark.limit_s - self._waited, 0.0) + 4 * self._tick_s
        if left < threading.TIMEOUT_MAX:
            signal.setitimer(signal.ITIMER_REAL, left)
        return left

    def _debugged(self) -> bool:
        """Whether a person looks at the main thread with a debugger: that may take as long as it takes."""
        frame = sys._current_frames().get(self._main.ident or 0)
        while frame:
            if str(frame.f_globals.get("__name__")).split(".")[0] in _DEBUGGERS:
                return True
            frame = frame.f_back
        return False

    # ---- the second: files -----------------------------------------------------------------------------

    def _listen(self) -> None:
        """Leave stacks for another rank that calls for them, though the own limit is not reached."""
        every = max(self._tick_s, min(2.0, self._grace_s / 4))
        while not self._ended.wait(every) and not self._hung.is_set():
            if self._stale:
                with self._dumping:
                    self._stale = False
                    self._forget_stacks()
            if self._waited < min(LISTEN_AFTER_S, self._limit_s / 4):
                continue
            if any(path.suffix == ".json" for path in _listed(self._stacks.parent)):
                with self._dumping:
                    if not self._hung.is_set() and not self._ended.is_set():
                        self._leave(self._mark)
                return

    def _report(self, mark: Mark) -> None:
        """Leave what others need, hear them, and say who is to blame."""
        try:
            with self._dumping:
                own, fault = self._leave(mark)
            self._conclude(mark, own, self._heard(own) if fault is None else None, fault)
        except Exception:  # it must end in any case
            traceback.print_exc()

    def _leave(self, mark: Mark) -> tuple[dict[str, Any], str | None]:
        """Stacks and progress of this rank into the run folder; (the progress, why it could not be written)."""
        own = self._progress(mark)
        try:
            self._forget_stacks()
            faulthandler.dump_traceback(file=self._file, all_threads=True)
            rundir.publish_json(self._progress_file(self._rank), own)
        except OSError as error:
            return own, error.strerror or str(error)
        return own, None

    def _progress(self, mark: Mark) -> dict[str, Any]:
        where, waits = stands(sys._current_frames().get(self._main.ident or 0))
        return {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": mark.step,
            "phase": mark.phase,
            "marks": mark.number,
            "seconds": round(self._waited, 3),
            "limit_s": float(mark.limit_s),
            "where": where,
            "in_collective": waits,
        }

    def _heard(self, own: dict[str, Any]) -> list[dict[str, Any] | None]:
        """The progress of all ranks, with None for those that have left nothing in time."""
        deadline = time.monotonic() + self._grace_s
        progress: list[dict[str, Any] | None] = [None] * self._world
        progress[self._rank] = own
        while True:
            there = {path.name for path in _listed(self._stacks.parent)}
            for rank, known in enumerate(progress):
                if known is None and self._progress_file(rank).name in there:
                    progress[rank] = _read(self._progress_file(rank))
            if None not in progress or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        ended = {fault.rank: "" if fault.cascade else fault.word for fault in faults.read(self._attempt)}
        for rank, known in enumerate(progress):
            if known is None and rank in ended:  # with "" as a consequence of what is to be found here
                progress[rank] = {"rank": rank, "ended": ended[rank]}
            elif known is None and (left := _left_before(self._attempt.stacks(rank))):
                progress[rank] = {"rank": rank, **left}
        return progress

    def _conclude(
        self, mark: Mark, own: dict[str, Any], progress: list[dict[str, Any] | None] | None, unwritten: str | None
    ) -> None:
        """Say it, record it, and let the trainer do the same."""
        text, folder = f"no progress for {self._waited:.0f} s: ", self._stacks.parent
        if progress is None:
            text += f"rank {self._rank}{_told(own)}; of others nothing is known: {folder} takes no files ({unwritten})"
            blamed = [self._rank]
        else:
            text += f"{culprit(progress)} (stacks: {folder})"
            blamed = _behind(progress) or list(range(self._world))
        self._say(text)
        record = Fault(
            rank=self._rank,
            host=own["host"],
            step=mark.step,
            phase=mark.phase,
            time=time.time(),
            word="hang",
            cascade=self._rank not in blamed,
            type="Hang",
            message=text,
            where=own["where"],
        )
        faults.note(self._attempt, record)
        for rank, known in enumerate(progress or []):
            if rank in blamed and not (known and "marks" in known) and self._speaks_first(progress or []):
                # It cannot say so itself; where it has said something else, that stands.
                left = {name: (known or {}).get(name, "") for name in ("host", "where")}
                faults.note(self._attempt, replace(record, rank=rank, cascade=False, **left))
        if self._on_hang:
            self._on_hang(text)

    def _speaks_first(self, progress: list[dict[str, Any] | None]) -> bool:
        """Whether this is the lowest of the ranks that could leave their progress."""
        return self._rank == min(rank for rank, known in enumerate(progress) if known and "marks" in known)

    def _say(self, text: str) -> None:
        print(f"rank {self._rank}: hang: {text}", file=sys.stderr, flush=True)

    # ---- files ---------------------------------------------------------------------------------------------

    def _progress_file(self, rank: int) -> Path:
        return self._attempt.stacks(rank).with_suffix(".json")

    def _head(self) -> None:
        """The first line of the file of stacks."""
        who = f"rank {self._rank} on {socket.gethostname()}, process {os.getpid()}"
        self._file.write(f"{who}; its main thread is 0x{self._main.ident:016x}\n")
        self._file.flush()

    def _forget_stacks(self) -> None:
        """Begin the file of stacks anew."""
        if self._file is not sys.__stderr__:
            self._file.seek(0)
            self._file.truncate()
            self._head()


def stands(frame: FrameType | None) -> tuple[str, bool]:
    """(the top frame of our own code below `frame`, whether it waits in a collective operation)."""
    where, top, waits = "", "", False
    while frame:
        code = frame.f_code
        top = top or f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
        where = faults.place(code.co_filename, frame.f_lineno, code.co_name)
        if where:
            break
        waits = waits or bool(_COLLECTIVES.search(code.co_filename))
        frame = frame.f_back
    return where or top, waits


def culprit(progress: Sequence[dict[str, Any] | None]) -> str:
    """Who is to blame that no rank goes on, in words; `progress[r]` is what rank r has left, None for nothing.

    A rank that left nothing has stopped or hangs in the kernel. Else the one with the fewest marks is behind; of
    several, those that wait in no collective operation: the others wait for them. It is a pure function.
    """
    behind = _behind(progress)
    if not behind:
        places: dict[str, list[int]] = {}
        for rank, known in enumerate(progress):
            if known and "marks" in known:
                places.setdefault(_told(known, host=False), []).append(rank)
        at = "; ".join(f"{_ranks(ranks)}{told}" for told, ranks in places.items())
        return f"no rank is behind, all wait in a collective operation (network, or not all in the same one): {at}"
    first, others = progress[behind[0]] or {}, len(progress) - len(behind)
    hosts = sorted({known["host"] for rank in behind if (known := progress[rank]) and known.get("host")})
    who = _ranks(behind) + (f" ({', '.join(hosts[:4])}{', ...' if len(hosts) > 4 else ''})" if hosts else "")
    if first.get("ended"):
        text = f"{who} had ended ({first['ended']}) and the others did not notice"
    elif "marks" in first:
        text = ", ".join(f"rank {rank}{_told(progress[rank] or {})}" for rank in behind[:4])
        text += f" and {len(behind) - 4} more" if len(behind) > 4 else ""
    elif first.get("where"):
        text = f"{who} holds Python's lock at {first['where']} and could leave its stacks alone"
    else:
        text = f"{who} left no word: stopped, gone, or hung in the kernel (storage, driver)"
    them = "them" if len(behind) > 1 else "it"
    return text + (f"; {others} other rank{'s wait' if others > 1 else ' waits'} for {them}" if others else "")


def _behind(progress: Sequence[dict[str, Any] | None]) -> list[int]:
    """The ranks that the others wait for; none if all are level and wait."""
    ended, silent, mute = [], [], []
    for rank, known in enumerate(progress):
        if known and "marks" in known:
            continue
        if known and "ended" in known:
            ended += [rank] if known["ended"] else []
        elif known and known.get("where"):
            mute.append(rank)
        else:
            silent.append(rank)
    if ended or silent or mute:
        return ended or silent or mute
    told = [known for known in progress if known and "marks" in known]
    fewest = min(known["marks"] for known in told)
    last = [known for known in told if known["marks"] == fewest]
    own = [known for known in last if not known["in_collective"]]
    if not own and len(last) == len(told) > 1:
        return []
    return [known["rank"] for known in own or last]


def _told(known: dict[str, Any], host: bool = True) -> str:
    """` (node1), step 3, training, stands at FILE:LINE in FUNCTION`."""
    on = f" ({known['host']})" if host else ""
    limit = f", within its own limit of {known['limit_s']:.0f} s" if known["seconds"] < known["limit_s"] else ""
    return f"{on}, step {known['step']}, {known['phase']}, stands at {known['where']}{limit}"


def _ranks(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0-7, 9`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _listed(folder: Path) -> list[Path]:
    # A listing, not a look at each name: NFS remembers for a while that a name was not there.
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _read(path: Path) -> dict[str, Any] | None:
    """A rank's progress; None for what is none."""
    try:
        known = json.loads(path.read_bytes())
        whole = all(isinstance(known[name], kind) for name, kind in _PROGRESS.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if whole else None


def _left_before(path: Path) -> dict[str, str] | None:
    """From the file of stacks of a rank whose Python code cannot run: its host, and where its main thread stands.

    It wrote the first line itself when it began; a stack is there if faulthandler could write it.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    head = _HEAD.match(text)
    if not head:
        return None
    _, _, stack = text.partition(_STACK)
    frames = [(f["file"], int(f["line"]), f["function"]) for f in _FRAME.finditer(stack.partition("\n\n")[0])]
    top = f"{frames[0][0]}:{frames[0][1]} in {frames[0][2]}" if frames else ""
    return {"host": head["host"], "where": next(filter(None, (faults.place(*frame) for frame in frames)), top)}
