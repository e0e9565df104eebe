"""What `vitdist report` makes: a page, Markdown or figures, once, or again and again while a run goes on."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vitdist import rundir
from vitdist.report import figures, markdown
from vitdist.report import page as pages
from vitdist.report.facts import Facts, read
from vitdist.report.words import verdict
from vitdist.rundir import RunDir


class Made(NamedTuple):
    path: Path
    going: bool
    """Whether there will be more to tell."""
    line: str
    """How things stand."""


def going(facts: Facts) -> bool:
    """Whether the run has not come to its end, or will be started once more."""
    if facts.record["state"] in ("submitted", "running", "requeued"):
        return True
    job = rundir.read_json(facts.run.attempts()[-1].job) or {}
    return job.get("state") == "requeued"


def page(run: RunDir, out: Path | None, every_s: int = 0) -> Made:
    """The page; while the run goes on, the browser reads it again every so many seconds, 0: never."""
    facts, place = read(run), out or run.report
    live = going(facts)
    rundir.publish(place, pages.page(facts, every_s if live else 0))
    return Made(place, live, verdict(facts)[1])


def text(run: RunDir, out: Path | None, drawn: Sequence[Path] = ()) -> Path:
    """The report in Markdown, with figures that were `drawn`, now or earlier."""
    place = out or run.path / "report.md"
    pictures = [path for path in drawn or (run.path / "figures").glob("*.png") if path.suffix == ".png"]
    from_here = [Path(os.path.relpath(path, place.parent)) for path in pictures]
    rundir.publish(place, markdown.of_run(read(run), time.time(), from_here))
    return place


def drawings(run: RunDir, folder: Path | None) -> list[Path]:
    """Every figure as files."""
    return figures.write(figures.of_run(read(run)), folder or run.path / "figures")


def follow(make: Callable[[int], Made], every_s: int, sleep: Callable[[float], None] = time.sleep) -> None:
    """Make a page again and again until what it tells of has ended. After Ctrl-C, it asks to be read again no more."""
    terminal, told = sys.stdout.isatty(), ""
    try:
        while True:
            path, live, line = make(every_s)
            if terminal:
                line = f"{path}  {time.strftime('%H:%M:%S')}  {line}"
                print(f"\r\x1b[K{line[: os.get_terminal_size().columns - 1]}", end="", flush=True)
            elif line != told:
                print(f"{path}: {line}", flush=True)
            if not live:
                break
            told = line
            sleep(every_s)
    except KeyboardInterrupt:
        make(0)
        raise
    finally:
        if terminal:
            print()
