"""`vitdist sync`: runs' offline W&B parts to the server, from the login node. Imports no torch and no wandb.

Each run has a process of its own (vitdist/upload.py), several at a time: W&B's service and its settings belong to a
process, and what a run's upload meets stays with that run.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vitdist import rundir, upload
from vitdist.console import progress
from vitdist.report import folders
from vitdist.rundir import RunDir

QUIET_S = 600.0
"""A part that nothing was written to for this long grows no more. A trainer writes system figures every 15 s."""


def find(names: Sequence[str]) -> list[RunDir]:
    """The runs that are named: runs, sweeps and folders of runs. Raises ValueError."""
    return folders.find([Path(name) for name in names])[0]


@dataclass
class Outcome:
    """What became of one run."""

    run: RunDir
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    sent: int = 0
    parts: int = 0
    unfinished: bool = False
    busy: bool = False
    url: str = ""
    server: bool = False
    """It failed by what other runs would meet as well."""

    def take(self, told: dict[str, Any]) -> None:
        """One line of the child."""
        part = told.get("part", "")
        if "error" in told:
            self.errors.append(f"{part}: {told['error']}" if part else told["error"])
            self.server |= bool(told.get("server"))
        elif told.get("busy"):
            self.busy = True
        elif told.get("empty"):
            self.notes.append(f"{part} has nothing in it: its start was killed before anything was written")
        else:
            self.sent += told["sent"]
            self.unfinished |= told["unfinished"]
            if "url" in told:
                self.parts += 1
                self.url = told["url"] or self.url
            if told.get("note"):
                self.notes.append(f"{part}: {told['note']}")
            if told.get("damaged"):
                self.notes.append(f"{part} is damaged in {told['damaged']} places: what lay there is left out")

    @property
    def kind(self) -> str:
        if self.errors:
            return "failed"
        if self.busy:
            return "left to another sync"
        return "so far, still training" if self.unfinished else "uploaded" if self.parts else "nothing to upload"

    def lines(self) -> list[str]:
        """What is told of it when it is done."""
        if not (self.parts or self.busy):
            return self.notes_told()
        rows = f", {self.sent:,} rows in {self.parts} part{'s' * (self.parts != 1)}" if self.parts else ""
        return [f"{self.run.path}: {self.kind}{rows} {self.url}".rstrip(), *self.notes_told()]

    def notes_told(self) -> list[str]:
        return [f"{self.run.path}: {note}" for note in self.notes]


class Look(NamedTuple):
    """A run from outside."""

    parts: tuple[tuple[str, int], ...]
    """What is not all uploaded: each folder's name and the bytes of its rows, -1 where they cannot be seen."""
    training: bool
    """The newest part may still grow."""


def look(run: RunDir, online: bool) -> Look:
    """What there is to upload of a run; with `online` also of its parts that were online."""
    found, newest = [], 0.0
    for folder in upload.folders(run, online=True):
        size, done, newest = -1, False, 0.0
        with contextlib.suppress(OSError):  # the child says why
            log = upload.log_of(folder)
            if log is not None:
                size, newest, done = log.stat().st_size, log.stat().st_mtime, upload.uploaded(log)
        if not done and (online or folder.name.startswith("offline-")):
            found.append((folder.name, size))
    try:
        running = rundir.state(run).get("state") == "running"
    except (OSError, ValueError):  # a record that cannot be read rules nothing out
        running = True
    return Look(tuple(found), running and time.time() - newest < QUIET_S)


class Sync:
    """Uploads of runs, once or again and again. `online`: parts that were online too."""

    def __init__(self, jobs: int, online: bool) -> None:
        self._jobs, self._online = jobs, online
        self._children: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._over = False
        self._seen: dict[Path, Look] = {}
        """Runs that were uploaded as far as they went, as they were."""
        self._told: set[str] = set()

    def round(self, runs: Sequence[RunDir]) -> list[Outcome]:
        """Upload what is new of each run, and tell of it. Raises KeyboardInterrupt."""
        self._over = False
        looks = {run.path: look(run, self._online) for run in runs}
        due = [run for run in runs if looks[run.path].parts and looks[run.path] != self._seen.get(run.path)]
        outcomes = [Outcome(run) for run in runs if run not in due]
        pool = ThreadPoolExecutor(self._jobs)
        try:
            with progress("uploading", len(due), "runs") as show:
                jobs = [pool.submit(self._one, run, looks[run.path].training) for run in due]
                for count, job in enumerate(as_completed(jobs), 1):
                    outcome = job.result()
                    outcomes.append(outcome)
                    if not outcome.errors and not outcome.busy:
                        self._seen[outcome.run.path] = looks[outcome.run.path]
                    for line in outcome.lines():
                        if line not in self._told:
                            print(line, flush=True)
                    self._told.update(outcome.notes_told())
                    show(count)
        except BaseException:
            self._stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return outcomes

    def _one(self, run: RunDir, training: bool) -> Outcome:
        outcome = Outcome(run)
        flags = ["--online"] * self._online + ["--training"] * training
        child = self._start([sys.executable, "-m", "vitdist.upload", str(run.path), *flags])
        if child is None:
            outcome.errors.append("not tried after that")
            return outcome
        assert child.stdout
        assert child.stderr
        with child:
            said: list[str] = []
            reader = threading.Thread(target=said.extend, args=(child.stderr,), daemon=True)
            reader.start()
            for line in child.stdout:
                if line.startswith("{"):
                    outcome.take(json.loads(line))
                else:  # of a library
                    said.append(line)
            reader.join()
            code = child.wait()
        with self._lock:
            self._children.discard(child)
            self._over |= outcome.server
        if code and not outcome.errors:
            last = said[-1].strip() if said else f"signal {-code}" if code < 0 else f"exit code {code}"
            outcome.errors.append(f"its upload ended too early ({last}): the same command goes on")
        return outcome

    def _start(self, command: list[str]) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._over:
                return None
            # A session of its own: Ctrl-C at the terminal reaches this process alone, which ends the children.
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._children.add(child)
            return child

    def _stop(self) -> None:
        with self._lock:
            self._over = True
            children = list(self._children)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)


def once(runs: Sequence[RunDir], jobs: int, online: bool) -> int:
    """Upload; returns 0, or 1 if a run failed."""
    return _sum_up(Sync(jobs, online).round(runs))


def watch(folders: Sequence[str], jobs: int, online: bool, every_s: float) -> int:
    """Upload again and again, new runs too, until Ctrl-C. Returns 0, or 1 if a run failed in the last round."""
    sync, code, told = Sync(jobs, online), 0, list[str]()
    print(f"looks every {every_s:.0f} s for new rows, until Ctrl-C", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            failures = _failures(sync.round(find(folders)))
            code = int(bool(failures))
            if failures != told:
                told = failures
                _tell(failures)
            time.sleep(every_s)
    print("no longer watching; the same command goes on")
    return code


def listing(runs: Sequence[RunDir], online: bool) -> int:
    """Tell what would be uploaded."""
    for run in runs:
        parts, training = look(run, online)
        print(
            f"{run.path}: {len(parts) or 'no'} part{'s' * (len(parts) != 1)} to upload{', still training' * training}"
        )
        for name, _ in parts:
            print(f"    {name}")
    return 0


def _sum_up(outcomes: Sequence[Outcome]) -> int:
    if len(outcomes) == 1 and outcomes[0].kind == "nothing to upload":
        print(f"{outcomes[0].run.path}: nothing to upload")
    elif len(outcomes) > 1:
        kinds = Counter(outcome.kind for outcome in outcomes)
        print(f"{len(outcomes)} runs: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    failures = _failures(outcomes)
    _tell(failures)
    return int(bool(failures))


def _failures(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each reason, with the runs that it met."""
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        for reason in outcome.errors:
            reasons.setdefault(reason, []).append(str(outcome.run.path))
    found = []
    for reason, runs in reasons.items():
        others = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
        found.append(f"{', '.join(runs[:3])}{others}: {reason}")
    return found


def _tell(failures: Sequence[str]) -> None:
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr, flush=True)
