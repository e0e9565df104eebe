"""Which evaluation was the best, and whether to go on: pure functions over a history. Imports no torch.

    done = selection.Evaluations(run, journal.publish)         # rank 0
    done.record(step, metrics)                                 # after each evaluation
    history = done.history("macro_f1", up_to=step)             # [(step, value), ...]
    selection.best(history, "macro_f1"), selection.exhausted(history, "macro_f1", patience)

The history lies in the run folder (evaluations.json) and appears whole. A run that goes on from an earlier step does
its evaluations again: a record replaces that of its step, and takes away those of later ones, which are undone.
The running attempt decides by what it holds in memory, so that a full disk changes no decision.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitdist import rundir
from vitdist.rundir import RunDir

LOWER_IS_BETTER = {"loss", "calibration_error"}

History = Sequence[tuple[int, float | None]]
"""Steps, rising, and one metric of the evaluation there; None or NaN where it had no value."""


def higher_is_better(metric: str) -> bool:
    return metric not in LOWER_IS_BETTER


def best(history: History, metric: str) -> tuple[int, float] | None:
    """The best evaluation, of equals the first; None where none has a value."""
    sign = 1 if higher_is_better(metric) else -1
    valued = [(step, value) for step, value in history if value is not None and not math.isnan(value)]
    return max(valued, key=lambda entry: sign * entry[1], default=None)


def exhausted(history: History, metric: str, patience: int | None) -> bool:
    """Whether the newest `patience` evaluations brought nothing better than what was before; None never ends."""
    if patience is None or len(history) < patience:
        return False
    found = best(history, metric)
    since = sum(step > found[0] for step, _ in history) if found else len(history)
    return since >= patience


def path(run: RunDir) -> Path:
    return run.path / "evaluations.json"


class Evaluations:
    """The evaluations of a run so far: held in memory and, after each change, published.

    `publish` (path, text) puts evaluations.json in its place; one that keeps the text for later is fine.
    """

    def __init__(self, run: RunDir, publish: Callable[[Path, str], None] = rundir.publish) -> None:
        self._path, self._publish = path(run), publish
        self._entries: list[dict[str, Any]] = _read(self._path)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the evaluation at `step`; of that step and later ones nothing else remains."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._set([*self._up_to(step - 1), {"step": step, "metrics": finite}])

    def forget_after(self, step: int) -> None:
        """What was evaluated after `step`, where a run goes on from, is undone."""
        if len(kept := self._up_to(step)) < len(self._entries):
            self._set(kept)

    def history(self, metric: str, up_to: int | None = None) -> list[tuple[int, float | None]]:
        """(step, value) of the evaluations at most at step `up_to`, where a run goes on from; [] before the first."""
        return [(entry["step"], entry["metrics"].get(metric)) for entry in self._up_to(up_to)]

    def _up_to(self, step: int | None) -> list[dict[str, Any]]:
        return [entry for entry in self._entries if step is None or entry["step"] <= step]

    def _set(self, entries: list[dict[str, Any]]) -> None:
        self._entries = entries
        record = {"schema": rundir.SCHEMA, "evaluations": entries}
        self._publish(self._path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _read(place: Path) -> list[dict[str, Any]]:
    try:
        return list((rundir.read_json(place) or {"evaluations": []})["evaluations"])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{place} is damaged: put a copy back, or remove it to begin the history anew") from None


def record(run: RunDir, step: int, metrics: Mapping[str, float]) -> None:
    """`Evaluations.record` in the run folder. Raises OSError."""
    Evaluations(run).record(step, metrics)


def forget_after(run: RunDir, step: int) -> None:
    """`Evaluations.forget_after` in the run folder. Raises OSError."""
    Evaluations(run).forget_after(step)


def history(run: RunDir, metric: str, up_to: int | None = None) -> list[tuple[int, float | None]]:
    """`Evaluations.history` of the run folder."""
    return Evaluations(run).history(metric, up_to)
