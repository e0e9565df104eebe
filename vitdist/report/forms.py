"""What `vitdist report` makes: a page, Markdown or figures, once, or again and again while a run goes on."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vitdist import rundir
from vitdist.report import compare, compare_page, figures, folders, markdown
from vitdist.report import page as pages
from vitdist.report.facts import read
from vitdist.report.words import going, verdict
from vitdist.rundir import RunDir

OF = "runs.json"
"""Beside the figures of a comparison: of which runs they are. Others may share their common folder."""


class Made(NamedTuple):
    path: Path
    going: bool
    """Whether there will be more to tell."""
    line: str
    """How things stand."""


def page(runs: Sequence[RunDir], home: Path, out: Path | None, every_s: int = 0) -> Made:
    """The page of a run, or the comparison of several in their folder `home`.

    While one goes on, the browser reads it again every so many seconds; 0: never.
    """
    if len(runs) > 1:
        place, found = out or home / "comparison.html", compare.read_all(runs)
        live = any(entry.going for entry in found.entries)
        named = [home] if (home / folders.SWEEP).exists() else [run.path for run in runs]
        content = compare_page.page(found, place.parent, every_s if live else 0, named)
        line = " ".join(compare.head(found))
    else:
        place, facts = out or runs[0].report, read(runs[0])
        live = going(facts)
        content, line = pages.page(facts, every_s if live else 0), verdict(facts)[1]
    rundir.publish(place, content)
    return Made(place, live, line)


def text(runs: Sequence[RunDir], home: Path, out: Path | None, drawn: Sequence[Path] = ()) -> Path:
    """The same in Markdown, with figures that were `drawn`, now or earlier."""
    several = len(runs) > 1
    place = out or (home / "comparison.md" if several else runs[0].path / "report.md")
    pictures = drawn or _drawn(runs, home)
    from_here = [Path(os.path.relpath(path, place.parent)) for path in pictures if path.suffix == ".png"]
    now = time.time()
    if several:
        rundir.publish(place, markdown.of_runs(compare.read_all(runs), now, from_here))
    else:
        rundir.publish(place, markdown.of_run(read(runs[0]), now, from_here))
    return place


def drawings(runs: Sequence[RunDir], home: Path, folder: Path | None) -> list[Path]:
    """Every figure as files. Raises ValueError where there is nothing to draw."""
    several = len(runs) > 1
    made = figures.of_runs(compare.read_all(runs)) if several else figures.of_run(read(runs[0]))
    if not made:
        raise ValueError(f"{home if several else runs[0].path}: there is nothing to draw before the second row")
    if folder or not several:
        return figures.write(made, folder or _figures(runs, home))
    shown, record = _figures(runs, home), _figures(runs, home) / OF
    record.unlink(missing_ok=True)
    paths = figures.write(made, shown)
    about = {"runs": _named(runs, home), "figures": [path.name for path in paths]}
    rundir.publish_json(record, about)
    return paths


def _drawn(runs: Sequence[RunDir], home: Path) -> list[Path]:
    """Figures that were made earlier of these runs; of others in the same folder none."""
    folder = _figures(runs, home)
    if len(runs) == 1:
        return list(folder.glob("*.png"))
    record = rundir.read_json(folder / OF) or {}
    return [folder / name for name in record.get("figures", ())] if record.get("runs") == _named(runs, home) else []


def _named(runs: Sequence[RunDir], home: Path) -> list[str]:
    return sorted(compare.relative(run.path, home) for run in runs)


def _figures(runs: Sequence[RunDir], home: Path) -> Path:
    return home / "comparison-figures" if len(runs) > 1 else runs[0].path / "figures"


def follow(make: Callable[[int], Made], every_s: int, sleep: Callable[[float], None] = time.sleep) -> None:
    """Make a page again and again until what it tells of has ended. After Ctrl-C, it asks to be read again no more."""
    terminal, told = sys.stdout.isatty(), ""
    try:
        while True:
            path, live, line = make(every_s)
            if terminal:
                line = f"{path}  {time.strftime('%H:%M:%S')}  {line}"
                print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
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
