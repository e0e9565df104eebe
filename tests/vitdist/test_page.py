"""What the page says of figures, of their age, of expectations and of classes.

pytest tests/vitdist/test_page.py
"""

from pathlib import Path
from typing import Any

from tests.vitdist.test_report import made, make_run
from vitdist import rundir
from vitdist.rundir import RunDir


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
