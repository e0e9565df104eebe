"""Which evaluation was the best, and whether to go on: pure functions over a history. Imports no torch.

    selection.record(run, step, metrics)                       # rank 0, after each evaluation
    history = selection.history(run, "macro_f1", up_to=step)   # [(step, value), ...]
    selection.best(history, "macro_f1"), selection.exhausted(history, "macro_f1", patience)

The history lies in the run folder (evaluations.json) and appears whole. A run that goes on from an earlier step does
its evaluations again: a record replaces that of its step, and takes away those of later ones, which are undone.
"""

import math
from collections.abc import Mapping, Sequence
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


def record(run: RunDir, step: int, metrics: Mapping[str, float]) -> None:
    """Add the evaluation at `step`; of that step and later ones nothing else remains."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    rundir.publish_json(path(run), {"evaluations": [*_entries(run, step - 1), {"step": step, "metrics": finite}]})


def forget_after(run: RunDir, step: int) -> None:
    """What was evaluated after `step`, where a run goes on from, is undone."""
    if len(kept := _entries(run, step)) < len(_entries(run, None)):
        rundir.publish_json(path(run), {"evaluations": kept})


def history(run: RunDir, metric: str, up_to: int | None = None) -> list[tuple[int, float | None]]:
    """(step, value) of the evaluations at most at step `up_to`, where a run goes on from; [] before the first one."""
    return [(entry["step"], entry["metrics"].get(metric)) for entry in _entries(run, up_to)]


def _entries(run: RunDir, up_to: int | None) -> list[dict[str, Any]]:
    kept = (rundir.read_json(path(run)) or {"evaluations": []})["evaluations"]
    return [entry for entry in kept if up_to is None or entry["step"] <= up_to]
