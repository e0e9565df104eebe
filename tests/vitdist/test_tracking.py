"""Rows and records; a tracker that fails takes nothing from the run."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from vitdist import rundir
from vitdist.config import Tracking
from vitdist.rundir import RunDir
from vitdist.tracking import Journal


def lines(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


@pytest.fixture
def broken_wandb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A W&B that starts and then fails at every row."""
    module = types.ModuleType("wandb")

    class Run:
        def define_metric(self, *names: str, **options: str) -> None: ...

        def log(self, row: dict[str, Any]) -> None:
            raise ConnectionResetError("the service is gone")

    module.Settings = lambda **options: options  # type: ignore[attr-defined]
    module.init = lambda **options: Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_dead_wandb_is_told_once_and_the_rows_go_on(
    tmp_path: Path, broken_wandb: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)
    with Journal(run, run.attempt(0), first=True) as journal:
        journal.start_wandb(Tracking(wandb="offline"), {})
        for step in range(3):
            journal.row(step, {"train/loss": 1.0})
    assert len(lines(run)) == 3
    assert capsys.readouterr().out.count("W&B failed and is left out from here on (ConnectionResetError") == 1


def test_wandb_that_is_not_installed_is_told_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = RunDir(tmp_path)
    with Journal(run, run.attempt(0), first=True) as journal:
        journal.start_wandb(Tracking(wandb="offline"), {})
        journal.row(1, {"train/loss": 1.0})
    assert "W&B failed and is left out" in capsys.readouterr().out
    assert len(lines(run)) == 1


def test_figures_that_are_not_finite_stay_json(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with Journal(run, run.attempt(0), first=True) as journal:
        journal.row(1, {"train/loss": float("nan"), "optim/grad_norm": float("inf"), "optim/loss_scale": 2.0})
    (row,) = lines(run)
    assert (row["train/loss"], row["optim/grad_norm"], row["optim/loss_scale"]) == (None, None, 2.0)


def test_a_torn_line_of_a_killed_attempt_is_ended(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.metrics.write_text('{"attempt": 0, "train/global_step": 1, "train/loss": 2.0}\n{"attempt": 0, "tra')
    with Journal(run, run.attempt(1), first=True) as journal:
        journal.row(2, {"train/loss": 1.0})
    assert [row["train/global_step"] for row in rundir.rows(run)] == [1, 2]


@pytest.mark.parametrize(("error", "state"), [(ValueError("bad shards"), "refused"), (OSError(28, "full"), "failed")])
def test_the_record_says_why_an_attempt_ended(tmp_path: Path, error: Exception, state: str) -> None:
    run = RunDir(tmp_path)
    journal = Journal(run, run.attempt(0), first=True)
    with pytest.raises(type(error)), journal:
        raise error
    record = json.loads(run.attempt(0).train.read_text())
    assert record["state"] == state
    assert record["error"]["type"] == type(error).__name__
    assert record["ended"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with Journal(run, run.attempt(0), first=False) as journal:
        journal.row(1, {"train/loss": 1.0})
        journal.record(state="done")
        journal.say("x")
        journal.start_wandb(Tracking(), {})
    assert not run.path.exists()
