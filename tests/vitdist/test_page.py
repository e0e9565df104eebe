"""What the page says of figures, of their age, of expectations and of classes.

pytest tests/vitdist/test_page.py
"""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.vitdist.test_report import give_recipe, made, make_run
from vitdist import config, rundir
from vitdist.report import charts, facts, words
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


def test_classes_without_validation_samples_are_counted_and_not_the_hardest(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["fine", "hard", "unseen"])
    scores = {"precision": 0.5, "f1": 0.5}
    each = [("fine", 8, 0.9), ("hard", 4, 0.1), ("unseen", 0, 0.0)]
    seen = made(evaluated(run, per_class=[{"name": n, "support": s, "recall": r, **scores} for n, s, r in each])).seen()
    assert "at step 200. 1 class has no validation samples." in seen
    assert "hard4 50.0% 10.0% 0.500 fine8" in seen
    assert "unseen0" not in seen


@pytest.mark.parametrize(("val", "judged"), [("elsewhere", False), (None, True)])
def test_what_was_measured_on_other_data_is_not_judged(tmp_path: Path, val: str | None, judged: bool) -> None:
    run = make_run(tmp_path)
    settings = config.read_yaml(run.config)
    settings["data"]["val"] = val or settings["data"]["val"]
    give_recipe(run, "# Expected: at least 95 %.", settings)
    seen = made(run).seen()
    assert ("This run is 3.3 points below that." in seen) == judged
    assert ("at least 95 %. This run was measured on other data" in seen) != judged


@pytest.mark.parametrize(
    ("chooses", "about", "more"),
    [
        ("top1", "Best top-1 90.0 %, at step 5.", []),
        ("balanced_accuracy", "Best balanced accuracy 90.0 %, at step 2.", []),
        ("calibration_error", "Best calibration error (ECE) 10.0 %, at step 9.", ["calibration error (ECE)"]),
        ("loss", "Best loss 0.300, at step 9.", []),
        ("auroc", "", []),
    ],
)
def test_quality_has_the_metric_that_chooses(tmp_path: Path, chooses: str, about: str, more: list[str]) -> None:
    run = make_run(tmp_path, ["cat", "dog"])
    run.config.write_text(run.config.read_text().replace("best: top1", f"best: {chooses}"))
    each = [(2, 0.5, 0.4, 0.9, 0.7, 0.3), (5, 0.9, 0.6, 0.5, 0.5, 0.2), (9, 0.6, 0.7, 0.6, 0.3, 0.1)]
    names = ("val/top1", "val/macro_f1", "val/balanced_accuracy", "val/loss", "val/calibration_error")
    rows(run, *({STEP: step, **dict(zip(names, of, strict=True))} for step, *of in each))
    chart = charts.quality(facts.read(run))
    assert chart is not None
    assert chart.about == about
    assert list(chart.curves) == ["top-1", "macro-F1", "balanced accuracy", *more]
