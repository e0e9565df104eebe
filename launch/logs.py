"""What the ranks of a run have printed: the files of an attempt, and following them over to the next attempt.

    show(run, Choice(rank=0), sys.stdout.buffer)                     # rank 0 of the newest attempt
    code = tail(run, Choice(rank=None), job, sys.stdout.buffer)      # all ranks, until the run ends

Bytes are passed on as they are; where several files are shown, each line says whose it is.
"""

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from launch import follow
from vitdist import rundir
from vitdist.config import SettingsError
from vitdist.rundir import Attempt, RunDir

LOOK_S = 0.3
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Choice:
    """Which logs of which attempt."""

    rank: int | None = 0
    """None: all ranks."""
    node: int | None = None
    """Only the ranks of this node."""
    attempt: int | None = None
    """None: the newest, and those that follow it."""
    lines: int | None = None
    """Only so many of the last lines of each file."""


def files(attempt: Attempt, choice: Choice) -> list[tuple[str, Path]]:
    """(whose, file) of the logs that are there, by rank."""
    found = []
    for path in attempt.path.glob("logs/node-*/rank-*.log"):
        node = re.fullmatch(r"node-(\d+)", path.parent.name)
        rank = re.fullmatch(r"rank-(\d+)\.log", path.name)
        if node and rank and choice.rank in (None, int(rank[1])) and choice.node in (None, int(node[1])):
            found.append((int(rank[1]), path))
    return [(f"rank {rank}", path) for rank, path in sorted(found)]


def show(run: RunDir, choice: Choice, out: BinaryIO) -> None:
    """Print what is there. Raises SettingsError if there is nothing."""
    attempt = _chosen(run, choice)
    found = files(attempt, choice) if attempt else []
    if not found:
        raise SettingsError(nothing(run, choice, attempt))
    for whose, path in found:
        prefix = f"{whose}: ".encode() if len(found) > 1 else b""
        with open(path, "rb") as file:
            _seek(file, choice.lines)
            if not prefix:
                while block := file.read(_BLOCK):
                    out.write(block)
            for line in file:
                out.write(prefix + line.rstrip(b"\n") + b"\n")
    out.flush()


def nothing(run: RunDir, choice: Choice, attempt: Attempt | None) -> str:
    """Why no log can be shown, and where to look."""
    attempts = run.attempts()
    if choice.attempt is not None and attempt is None:
        there = f"it has {attempts[0].number} to {attempts[-1].number}" if attempts else "it has none yet"
        return f"--attempt {choice.attempt}: {there}"
    if attempt is None:
        return f"{run.name} has not begun yet: add -f to wait for it"
    every = files(attempt, Choice(rank=None))
    if not every:
        where = f"{run.submitit}/*_log.out" if run.submitit.is_dir() else str(attempt.path)
        return f"no rank of attempt {attempt.number} has written a log; what came before the ranks: {where}"
    ranks = [int(whose.removeprefix("rank ")) for whose, _ in every]
    nodes = sorted({int(path.parent.name.removeprefix("node-")) for _, path in every})
    asked = " ".join(
        f"--{name} {value}" for name, value in (("rank", choice.rank), ("node", choice.node)) if value is not None
    )
    # Of a node alone: the rank that is looked for by default is not on it.
    hint = ""
    if choice.node in nodes and choice.rank is not None:
        on_it = files(attempt, Choice(rank=None, node=choice.node))
        hint = f"; node {choice.node} has {', '.join(whose for whose, _ in on_it)}"
    return f"{asked}: attempt {attempt.number} has ranks 0 to {max(ranks)} on nodes 0 to {nodes[-1]}{hint}"


def tail(run: RunDir, choice: Choice, job: follow.Job, out: BinaryIO) -> int:
    """Print the logs as they grow, over to the next attempts, until the run ends; returns its exit code."""
    readers: dict[Path, _Reader] = {}
    number: int | None = None
    first = _chosen(run, choice)
    news = follow.News(first.number if first else 0)
    while True:
        over = _over(run, choice, job)  # before reading: what was written until then is read below
        attempt = _chosen(run, choice)
        if attempt:
            if number is not None and number != attempt.number:
                for reader in readers.values():
                    reader.copy(out, last=True)
                out.flush()
                readers = {}
            number = attempt.number
            found = files(attempt, choice)
            for whose, path in found:
                if path not in readers:
                    prefix = f"{whose}: " if choice.rank is None else ""
                    readers[path] = _Reader(path, prefix.encode(), choice.lines)
            for reader in readers.values():
                reader.copy(out, last=over)
            out.flush()
        for line in news.of(run, job):
            _say(line)
        if over:
            return _code(attempt)
        time.sleep(LOOK_S)


def _say(line: str) -> None:
    print(f"--- {line}", file=sys.stderr, flush=True)


def _over(run: RunDir, choice: Choice, job: follow.Job) -> bool:
    job.state()
    if choice.attempt is not None:
        chosen = _chosen(run, choice)
        ended = (rundir.read_json(chosen.job) or {}).get("ended") if chosen else None
        newer = chosen is not None and run.attempts()[-1].number > chosen.number
        return bool(ended) or newer or job.over()
    attempts = run.attempts()
    record = (rundir.read_json(attempts[-1].job) if attempts else None) or {}
    waiting = bool(job.waits())  # a new start of a run that has ended before
    return (follow.has_ended(record, job) and not waiting) or job.over()


def _code(attempt: Attempt | None) -> int:
    record = (rundir.read_json(attempt.train) if attempt else None) or {}
    codes = {"done": rundir.EXIT_DONE, "stopped": rundir.EXIT_STOPPED}
    return codes.get(str(record.get("state")), follow.EXIT_FAILED)


def _chosen(run: RunDir, choice: Choice) -> Attempt | None:
    attempts = run.attempts()
    if choice.attempt is None:
        return attempts[-1] if attempts else None
    return next((attempt for attempt in attempts if attempt.number == choice.attempt), None)


class _Reader:
    """A file that grows."""

    def __init__(self, path: Path, prefix: bytes, lines: int | None) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (it is read as long as the run goes)
        self._prefix, self._rest = prefix, b""
        _seek(self._file, lines)

    def copy(self, out: BinaryIO, last: bool) -> None:
        """Pass on what is new: whole lines where they have a prefix; all that is left if it is the `last` time."""
        while new := self._file.read(_BLOCK):
            if not self._prefix:
                out.write(new)
                continue
            *lines, self._rest = (self._rest + new).split(b"\n")
            for line in lines:
                out.write(self._prefix + line + b"\n")
        if last:
            if self._rest:
                out.write(self._prefix + self._rest + b"\n")
            self._file.close()


def _seek(file: BinaryIO, lines: int | None) -> None:
    """To where the last `lines` lines begin; None: to the beginning."""
    if lines is None:
        return
    end = file.seek(0, 2)
    file.seek(max(0, end - 1))
    wanted = lines + (file.read(1) == b"\n")  # the end of the last line begins none
    if lines == 0:
        file.seek(end)
        return
    for start, block in _blocks_back(file, end):
        newlines = [match.start() for match in re.finditer(b"\n", block)]
        if len(newlines) >= wanted:
            file.seek(start + newlines[-wanted] + 1)
            return
        wanted -= len(newlines)
    file.seek(0)


def _blocks_back(file: BinaryIO, end: int) -> Iterator[tuple[int, bytes]]:
    """(where, bytes) of blocks from the end to the beginning."""
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        yield start, file.read(end - start)
        end = start
