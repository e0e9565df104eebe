"""What the page says of figures, of their age, of expectations and of classes.

pytest tests/vitdist/test_page.py
"""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.vitdist.test_report import made, make_run
from vitdist import rundir
from vitdist.report import facts, words
from vitdist.rundir import RunDir

STEP = "train/global_step"


def evaluated(run: RunDir, **parts: Any) -> RunDir:
    """The run with `parts` of its evaluation replaced."""
    rundir.publish_json(run.evaluation, {**(rundir.read_json(run.evaluation) or {}), **parts})
    return run


def test_every_figure_stands_there_with_its_interval(tmp_path: Path) -> None:
    metrics = {"top1": 0.25, "top5": 0.75, "auroc": 0.625, "loss": 1.5, "samples": 12}
    run = evaluated(make_run(tmp_path), metrics=metrics, intervals={"top1": [0.216, 0.307], "auroc": [0.5, 0.75]})
    seen = made(run).seen()
    assert "25.0% of the validation samples are classified right (top-1, 95% interval 21.6 to 30.7%)" in seen
    assert "accuracy (top-1)25.0 % 21.6 to 30.7 % accuracy (top-5)75.0 % - AUROC" in seen
    assert "AUROC (each class against the rest, mean)0.625 0.500 to 0.750 loss1.500 -" in seen


def rows(run: RunDir, *changes: dict[str, Any]) -> RunDir:
    """The run with these rows alone."""
    made = ({"attempt": 0, "train/loss": 2.0, "perf/images_per_s": 50.0} | change for change in changes)
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in made))
    return run


def test_last_figures_are_told_with_the_step_that_they_are_of(tmp_path: Path) -> None:
    run = make_run(tmp_path, state="failed", ended=None)
    rows(run, {STEP: 1, "optim/grad_norm": 3.0}, *({STEP: s, "train/loss": None} for s in (2, 18)))
    assert "Last figures, at step 18: images/s 50; at step 1: training loss 2, gradient norm 3." in made(run).seen()


@pytest.mark.parametrize(
    ("ago", "apart", "said"),
    [
        (5, 1, "At step 200 of 200, about 11 s left."),
        (500, 1, "At step 200 of 200, about 11 s left."),
        (3 * 86400, 1, "At step 200 of 200; nothing was written for 3 d."),
        (3600, 1200, "At step 200 of 200, about 11 s left."),
        (4 * 3600, 1200, "At step 200 of 200; nothing was written for 4 h."),
    ],
)
def test_of_a_run_that_fell_silent_no_end_is_foretold(tmp_path: Path, ago: int, apart: int, said: str) -> None:
    run, now = make_run(tmp_path, state="running", ended=None), time.time()
    rows(run, *({STEP: s, "time": now - ago - apart * (5 - s), "perf/eta_s": 11.0} for s in range(1, 6)))
    assert said in words.verdict(facts.read(run))[1]


def test_a_start_that_has_written_nothing_yet_is_not_silent(tmp_path: Path) -> None:
    run, now = make_run(tmp_path, state="running", ended=None), time.time()
    rows(run, *({STEP: s, "time": now - 86400 + s, "perf/eta_s": 11.0} for s in range(1, 6)))
    began = datetime.fromtimestamp(now - 60, UTC).isoformat()
    rundir.publish_json(run.attempt(1).train, {"state": "running", "resumed_from": 5, "started": began})
    assert "nothing was written" not in words.verdict(facts.read(run))[1]
