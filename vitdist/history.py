"""The figures of a run, metrics.jsonl, as columns. Imports no torch.

    history.read(run).series("train/loss")    # steps and values, as arrays

Read in one pass into 8 bytes a figure: of 100,000 rows of 30 figures, dicts would take ten times that. The rows stand
in the order of steps; of steps that were done twice (after a resume), the newest count. Lines that a killed writer left
half-written are passed over.
"""

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vitdist.rundir import RunDir

STEP, ATTEMPT, TIME, EVALUATION = "train/global_step", "attempt", "time", "val/loss"


class Reached(NamedTuple):
    """How far an attempt came by its rows, later undone or not."""

    step: int
    time: float | None
    """Seconds since 1970; None where no row has one."""


@dataclass(frozen=True)
class _Block:
    """Rows that have the same keys."""

    at: np.ndarray
    """int64 [rows]: which place among all that count each of them has, -1 where it does not count."""
    values: np.ndarray
    """float64 [rows, keys]; NaN for what is no number."""


@dataclass(frozen=True)
class History:
    steps: np.ndarray
    """int64 [rows]: the step of each row that counts; twice where it was trained and evaluated."""
    reached: dict[int, Reached]
    """Of each attempt that wrote a row."""
    blocks: dict[tuple[str, ...], _Block]

    def names(self) -> set[str]:
        """What rows that count have a value of, whatever that is."""
        return {key for keys, block in self.blocks.items() if (block.at >= 0).any() for key in keys}

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps int64, values float64) of one figure, without gaps, infinities and NaN."""
        places, values = [np.empty(0, np.int64)], [np.empty(0)]
        for keys, block in self.blocks.items():
            if key in keys:
                column = block.values[:, keys.index(key)]
                good = np.isfinite(column) & (block.at >= 0)
                places.append(block.at[good])
                values.append(column[good])
        at, found = np.concatenate(places), np.concatenate(values)
        order = np.argsort(at, kind="stable")
        return self.steps[at[order]], found[order]


def read(run: RunDir) -> History:
    """All rows of the run; none before the first one was written."""
    steps, attempts, kinds = array("q"), array("q"), array("b")
    blocks: dict[tuple[str, ...], tuple[array[int], array[float]]] = {}
    reached: dict[int, Reached] = {}
    first_of_attempt: dict[int, int] = {}
    for row in _rows(run):
        step, attempt, evaluated = row[STEP], row[ATTEMPT], EVALUATION in row
        if not evaluated:  # an evaluation that was owed is of the step that the attempt goes on from
            first_of_attempt.setdefault(attempt, step)
        earlier = reached[attempt].time if attempt in reached else None
        reached[attempt] = Reached(step, row.get(TIME, earlier))
        lines, values = blocks.setdefault(tuple(row), (array("q"), array("d")))
        lines.append(len(steps))
        _append(values, row)
        steps.append(step)
        attempts.append(attempt)
        kinds.append(evaluated)
    step_of = np.array(steps, np.int64)
    place = _places(step_of, np.array(attempts, np.int64), np.array(kinds, np.int64), first_of_attempt)
    counted = np.empty(place.max(initial=-1) + 1, np.int64)
    counted[place[place >= 0]] = step_of[place >= 0]
    return History(
        counted,
        reached,
        {
            keys: _Block(place[np.array(lines, np.int64)], np.array(values).reshape(len(lines), len(keys)))
            for keys, (lines, values) in blocks.items()
        },
    )


def _rows(run: RunDir) -> Iterator[dict[str, Any]]:
    """The lines that are whole."""
    if not run.metrics.exists():
        return
    with open(run.metrics, "rb") as file:
        for line in file:
            try:
                row = json.loads(line.decode())
            except ValueError:  # half a line, or half a letter
                continue
            if isinstance(row, dict) and isinstance(row.get(STEP), int) and isinstance(row.get(ATTEMPT), int):
                yield row


def _append(values: "array[float]", row: Mapping[str, Any]) -> None:
    """The values of `row`, NaN for those that are no numbers or larger than any float."""
    try:
        values.fromlist(list(row.values()))  # all or none
    except (TypeError, OverflowError):
        values.extend(_number(value) for value in row.values())


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else np.nan
    except OverflowError:
        return np.nan


def _places(steps: np.ndarray, attempts: np.ndarray, kinds: np.ndarray, first: Mapping[int, int]) -> np.ndarray:
    """Place of each row by (step, kind); -1 for one written anew, or beyond where a later attempt began."""
    order = np.lexsort((kinds, steps))  # stable: the newest of equal ones is the last
    last = np.ones(len(order), bool)
    last[:-1] = (np.diff(steps[order]) != 0) | (np.diff(kinds[order]) != 0)
    kept = order[last]
    # Of attempts in their order, the lowest first step of those from each one on; nothing is beyond the last one's.
    numbers = np.array(sorted(first), np.int64)
    lowest = np.minimum.accumulate(np.array([np.iinfo(np.int64).max, *(first[n] for n in numbers[::-1].tolist())]))[
        ::-1
    ]
    kept = kept[steps[kept] < lowest[np.searchsorted(numbers, attempts[kept], "right")]]
    place = np.full(len(steps), -1, np.int64)
    place[kept] = np.arange(len(kept))
    return place
