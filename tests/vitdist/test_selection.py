"""The best evaluation and the end of patience; a history that follows a run back to an earlier step."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitdist import rundir, selection
from vitdist.rundir import RunDir

VALUES = st.one_of(st.none(), st.just(math.nan), st.sampled_from([0.1, 0.2, 0.3]), st.just(math.inf))


def test_the_first_of_equals_is_the_best() -> None:
    history = [(10, 0.5), (20, 0.7), (30, None), (40, math.nan), (50, 0.7)]
    assert selection.best(history, "top1") == (20, 0.7)
    assert selection.best(history, "loss") == (10, 0.5)
    assert selection.best(history, "calibration_error") == (10, 0.5)
    assert selection.best([(10, None), (20, math.nan)], "auroc") is None
    assert selection.best([], "top1") is None


@pytest.mark.parametrize("metric", ["top1", "top5", "balanced_accuracy", "macro_f1", "auroc"])
def test_more_of_these_is_better(metric: str) -> None:
    assert selection.higher_is_better(metric)


@given(st.lists(VALUES, max_size=8), st.sampled_from(["top1", "loss"]), st.integers(1, 4))
def test_patience_ends_as_a_plain_count_does(values: list[float | None], metric: str, patience: int) -> None:
    best, without = None, 0
    for value in values:
        known = value is not None and not math.isnan(value)
        better = known and (best is None or (value > best if metric == "top1" else value < best))
        best, without = (value, 0) if better else (best, without + 1)
    history = [(10 * i, value) for i, value in enumerate(values)]
    assert selection.exhausted(history, metric, patience) == (without >= patience)
    assert not selection.exhausted(history, metric, None)


def test_a_run_that_goes_back_does_its_evaluations_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert selection.history(run, "top1") == []
    for step, value in ((10, 0.5), (20, 0.6), (30, 0.9)):
        selection.record(run, step, {"top1": value, "loss": 1 - value})
    assert selection.history(run, "loss", up_to=20) == [(10, 0.5), (20, 1 - 0.6)]
    selection.record(run, 20, {"top1": 0.7, "loss": math.nan})  # resumed at 10: 20 again, 30 is undone
    assert selection.history(run, "top1") == [(10, 0.5), (20, 0.7)]
    assert selection.history(run, "loss") == [(10, 0.5), (20, None)]
    assert selection.history(run, "auroc") == [(10, None), (20, None)]
    assert "NaN" not in selection.path(run).read_text()
    assert json.loads(selection.path(run).read_text())["schema"] == 1


def test_what_is_undone_is_forgotten(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    selection.forget_after(run, 0)
    assert not selection.path(run).exists()
    for step in (10, 20, 30):
        selection.record(run, step, {"top1": step / 100})
    selection.forget_after(run, 20)
    assert selection.history(run, "top1") == [(10, 0.1), (20, 0.2)]
    selection.forget_after(run, 0)
    assert selection.history(run, "top1") == []


def test_C3_decisions_hold_while_the_disk_takes_nothing(tmp_path: Path) -> None:
    run, full, later = RunDir(tmp_path), [False], []
    done = selection.Evaluations(run, lambda path, text: later.append(text) if full[0] else rundir.publish(path, text))
    done.record(10, {"top1": 0.5})
    full[0] = True
    for step, value in ((20, 0.9), (30, 0.7)):
        done.record(step, {"top1": value})
    assert selection.best(done.history("top1"), "top1") == (20, 0.9)
    assert selection.exhausted(done.history("top1"), "top1", 1)
    assert selection.history(run, "top1") == [(10, 0.5)]
    done.forget_after(20)
    rundir.publish(selection.path(run), later[-1])
    assert selection.history(run, "top1") == done.history("top1") == [(10, 0.5), (20, 0.9)]
