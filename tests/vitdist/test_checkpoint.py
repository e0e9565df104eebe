"""Checkpoints: the best one stays and can be loaded by its step. test_engine.py and test_train.py test the resume."""

from pathlib import Path

import pytest

from tests import ranks, workers

pytestmark = pytest.mark.processes


def test_the_best_stays_beside_the_newest_and_is_loaded_by_its_step(tmp_path: Path) -> None:
    for seen in ranks.run(workers.best, 2, str(tmp_path)):
        assert seen["kept"] == [[1], [2, 1], [3, 2], [4, 3, 2], [5, 4, 2]]
        assert (seen["step"], seen["equal"]) == (2, [2])
        gone, other, torn = seen["refusals"]
        assert "step-00000003 cannot be loaded: manifest.json is missing" in gone
        assert "optimizer was 'adamw', now 'lion'" in other
        assert "bytes instead of" in torn
