"""A sweep: lists of values -> points, a run folder each; which of them was best.

    points = expand("lr", ["optim.lr=1e-4,3e-4", "optim.layer_decay=0.65,0.75"])    # lr-00 ... lr-03
    write(home.path, sweep) -> runs/lr/sweep.yaml;  read(home.path)
    print(table(rows(home, read(home.path)), "top1"))

The first is pure. The whole product is taken: a sweep
of two or three settings is what people read as a table.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from vitdist import config, rundir
from vitdist.config import SettingsError
from vitdist.rundir import RunDir

if TYPE_CHECKING:  # a dry run has no use for it
    from launch.status import Status

MOST_POINTS = 1000
"""SLURM's MaxArraySize is 1001 unless the site says otherwise."""
LOWER_IS_BETTER = ("loss", "calibration_error")
FILE = "sweep.yaml"
SETTLED_S = 15.0
"""A point that has ended for so long without a result has ended for good."""
GO_ON = {"done", "stopped"}
"""States of a sweep that only needs to be resumed."""


class Point(NamedTuple):
    """One of the runs of a sweep."""

    name: str
    """Of its run folder."""
    overrides: tuple[str, ...]
    """`section.name=value`, one for each setting of the sweep."""


@dataclass(frozen=True)
class Sweep:
    """What sweep.yaml holds."""

    name: str
    metric: str
    """By which the points are ranked: evaluation.best of the recipe."""
    points: tuple[Point, ...]


# ---- lists of values -> points ---------------------------------------------------------------------


def expand(name: str, items: Sequence[str]) -> list[Point]:
    """The product of the lists, the last one varying fastest. Raises SettingsError with all faults."""
    faults: list[str] = []
    lists: dict[str, list[str]] = {}
    for item in items:
        setting, equals, text = item.partition("=")
        if not equals or not setting:
            faults.append(f"--sweep {item!r}: write section.name=value,value,...")
            continue
        if setting in lists:
            faults.append(f"--sweep {setting}: is given twice")
        try:
            lists[setting] = values(text)
        except ValueError as error:
            faults.append(f"--sweep {setting}: {error}")
    if faults:
        raise SettingsError("\nerror: ".join(faults))
    count = 1
    for found in lists.values():
        count *= len(found)
    if not 2 <= count <= MOST_POINTS:
        what = "a single point: give it as an override" if count < 2 else f"{count:,} points, more than {MOST_POINTS:,}"
        raise SettingsError(f"--sweep {' '.join(items)}: {what}")
    digits = max(2, len(str(count - 1)))
    products = itertools.product(*([f"{setting}={value}" for value in found] for setting, found in lists.items()))
    return [Point(f"{name}-{number:0{digits}}", overrides) for number, overrides in enumerate(products)]


_CLOSES = {"[": "]", "{": "}"}


def values(text: str) -> list[str]:
    """`text` split at its commas, but not at those in brackets or quotes. Raises ValueError."""
    parts, open_, quote = [""], list[str](), ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'" and parts[-1].rstrip()[-1:] in ("", *"[{,:"):  # an apostrophe inside of a word is none
            quote = sign
        elif sign in _CLOSES:
            open_.append(_CLOSES[sign])
        elif sign in _CLOSES.values():
            if not open_ or open_.pop() != sign:
                raise ValueError(f"{text!r}: {sign} closes nothing")
        elif sign == "," and not open_:
            parts.append("")
            continue
        parts[-1] += sign
    if open_ or quote:
        raise ValueError(f"{text!r}: {(quote or open_[-1])} is missing at its end")
    found = [part.strip() for part in parts]
    if "" in found:
        raise ValueError(f"{text!r}: has an empty value")
    if twice := [value for number, value in enumerate(found) if value in found[:number]]:
        raise ValueError(f"{twice[0]} is given twice")
    return found


def ranges(numbers: Iterable[int]) -> str:
    """As SLURM's `--array` takes them: 0-3,7."""
    parts: list[str] = []
    for _, group in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        parts.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return ",".join(parts)


# ---- the record ------------------------------------------------------------------------------------


def write(home: Path, sweep: Sweep) -> None:
    """Publish HOME/sweep.yaml."""
    points = [{"folder": point.name, "overrides": list(point.overrides)} for point in sweep.points]
    record = {"schema": rundir.SCHEMA, "name": sweep.name, "metric": sweep.metric, "points": points}
    rundir.publish(home / FILE, yaml.safe_dump(record, sort_keys=False, allow_unicode=True))


def read(home: Path) -> Sweep | None:
    """The sweep whose folder this is; None if it is none. Raises SettingsError for a damaged record."""
    if not (home / FILE).is_file():
        return None
    record = config.read_yaml(home / FILE)
    try:
        points = tuple(Point(entry["folder"], tuple(entry["overrides"])) for entry in record["points"])
        for point in points:
            rundir.check_name(point.name)
        return Sweep(record["name"], record["metric"], points)
    except (KeyError, TypeError, ValueError):
        raise SettingsError(f"{home / FILE}: is damaged: put a copy back, or choose another --name") from None


# ---- what came of it -------------------------------------------------------------------------------


class Row(NamedTuple):
    """A point and what came of it."""

    point: Point
    status: "Status"
    summary: dict[str, Any]
    """The trainer's figures of the whole run; {} before its end."""


def rows(home: RunDir, sweep: Sweep, patience_s: float = 10.0) -> list[Row]:
    """Where each point stands by its folder and by SLURM, in the order of the sweep."""
    from launch import status

    runs = [RunDir(home.path.parent / point.name) for point in sweep.points]
    found, _ = status.read_all(runs, patience_s)
    summaries = [rundir.state(run).get("summary") or {} for run in runs]
    return [Row(*row) for row in zip(sweep.points, found, summaries, strict=True)]


def follow(home: RunDir, tell: Callable[[str], None], every_s: float = 5.0) -> int:
    """Tell of each point that begins or ends, until all have ended; returns the exit code of the worst.

    Raises SettingsError where `home` is no sweep.
    """
    from launch import status

    sweep = read(home.path)
    if not sweep:
        raise SettingsError(f"{home.path}: is no sweep")
    before: dict[str, str] = {}
    ended_since: dict[str, float] = {}
    while True:
        found = rows(home, sweep)
        now = time.monotonic()
        for row in found:
            name, state = row.point.name, row.status.state
            if state in (*status.LIVE, "UNKNOWN", "new"):
                ended_since.pop(name, None)
            else:
                ended_since.setdefault(name, now)
            if before.get(name) != state:
                before[name] = state
                reached = f" at step {row.status.step} of {row.status.total}" if row.status.total else ""
                note = f": {row.status.note}" if row.status.note and state != "done" else ""
                tell(f"{label(row.point)}: {state}{reached}{note}")
        # Not at the first sight: a job that is being requeued passes through states that look like its end.
        sure = {row.point.name for row in found if row.status.state == "done"}
        sure |= {name for name, since in ended_since.items() if now - since > SETTLED_S}
        if len(sure) == len(found):
            states = {row.status.state for row in found}
            return rundir.EXIT_DONE if states == {"done"} else rundir.EXIT_STOPPED if states <= GO_ON else 1
        time.sleep(every_s)


def table(found: Sequence[Row], metric: str) -> str:
    """The points with their results, the best first; those without a result last."""
    columns = [metric, *(name for name in ("top1", "macro_f1", "loss") if name != metric)]
    sign = 1 if metric in LOWER_IS_BETTER else -1
    valued = [row for row in found if isinstance(row.summary.get(metric), int | float)]
    ordered = sorted(valued, key=lambda row: sign * row.summary[metric])
    ordered += [row for row in found if row not in valued]
    settings = [override.partition("=")[0] for override in found[0].point.overrides]
    lines = [["run", *settings, *columns, "state"]]
    for row in ordered:
        results = [_shown(row.summary.get(name)) for name in columns]
        reached = row.status.state
        if reached != "done" and row.status.total:
            reached += f" at step {row.status.step or 0}/{row.status.total}"
        told = [override.partition("=")[2] for override in row.point.overrides]
        lines.append([row.point.name, *told, *results, reached])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def label(point: Point) -> str:
    """A point in a line."""
    return f"{point.name}: {' '.join(point.overrides)}"
