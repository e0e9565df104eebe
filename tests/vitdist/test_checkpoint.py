"""Checkpoints by the engine alone, over gloo: other worlds and stages, refusals, damage, the writer's protocol.

test_engine.py resumes in every precision; test_train.py and test_interrupted.py do it with whole runs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import ranks, workers
from vitdist import model, optim

pytestmark = pytest.mark.processes

MOVES = {
    ("fp32", 2, 2, 3, 3),
    ("fp32", 2, 2, 1, 1),
    ("fp32", 4, 3, 2, 3),
    ("fp32", 1, 2, 2, 0),
    ("fp16", 2, 3, 1, 2),
    ("fp16", 2, 0, 1, 3),
}


def moves() -> list[Any]:
    """precision, world and stage before, world and stage after."""
    pairs = [(2, 1), (1, 2), (2, 3), (4, 2)]
    everything = [(p, a, z, b, y) for p in ("fp32", "fp16") for a, b in pairs for z in range(4) for y in range(4)]
    everything += sorted(MOVES - set(everything))
    return [pytest.param(*m, marks=[] if m in MOVES else pytest.mark.full) for m in everything]


@pytest.mark.parametrize(("precision", "world", "zero", "other_world", "other_zero"), moves())
def test_C7_another_world_and_stage_go_on_as_if_nothing_had_been(
    tmp_path: Path, precision: str, world: int, zero: int, other_world: int, other_zero: int
) -> None:
    """Five updates after the move: losses, weights, averages, the groups' rates, decays and members, Adam's counts."""
    how = {"engine.precision": precision, "optim.ema": 0.8, "optim.ema_warmup": "false", "engine.loss_scale_power": 8}
    how |= {"train.global_batch": 24}
    straight = ranks.run(workers.across, world, how | {"engine.zero": zero}, str(tmp_path), 4, 5)
    moved = ranks.run(workers.across, other_world, how | {"engine.zero": other_zero}, str(tmp_path), 0, 5)
    s = workers.settings(**how)
    expected = straight[0]
    # fp16 rounds gradients of other micro-batches otherwise.
    tolerance = 2e-6 if precision == "fp32" else 2e-3
    for seen in moved:
        assert seen["resumed"] == 4
        assert seen["counted"] == {4.0} == expected["counted"]
        assert seen["losses"] == pytest.approx(expected["losses"], abs=tolerance)
        assert seen["scale"] == expected["scale"]
        assert seen["rates"] == expected["rates"]
        assert seen["rates"]["00_embeddings"] == pytest.approx(optim.schedule(8, 20, s.optim) * 0.5**3)
        assert seen["decays"] == expected["decays"]
        assert seen["members"] == expected["members"]
        for what in ("weights", "average"):
            for name, values in expected[what].items():
                if not name.endswith("k_proj.bias"):  # noise, of which Adam makes steps: see test_engine.py
                    assert np.abs(seen[what][name] - values).max() < 10 * tolerance, (what, name)


@pytest.mark.parametrize(("world", "zero"), [(2, 2), (1, 3)])
def test_frozen_weights_come_back_on_every_rank(tmp_path: Path, world: int, zero: int) -> None:
    """workers.across gives a resuming engine other frozen weights than it saved."""
    model.build(workers.settings().model, workers.CLASSES, seed=5)[0].save_pretrained(tmp_path / "pretrained")
    how = {"model.scratch": "null", "model.pretrained": str(tmp_path / "pretrained"), "model.freeze": 1}
    straight = ranks.run(workers.across, 2, how | {"engine.zero": 2}, str(tmp_path), 3, 3)[0]
    for seen in ranks.run(workers.across, world, how | {"engine.zero": zero}, str(tmp_path), 0, 3):
        assert seen["resumed"] == 3
        assert seen["losses"] == pytest.approx(straight["losses"], abs=2e-6)


@pytest.mark.parametrize(("before", "after"), [("fp16", "bf16"), ("fp32", "fp16")])
def test_another_precision_begins_with_its_own_loss_scale(tmp_path: Path, before: str, after: str) -> None:
    """The scale of fp16 in another precision would divide gradients that nothing had multiplied."""
    how = {"engine.zero": 0, "engine.loss_scale_power": 8, "optim.name": "sgd", "optim.lr": 0.1}
    straight = ranks.run(workers.across, 1, how | {"engine.precision": before}, str(tmp_path), 4, 4)[0]
    seen = ranks.run(workers.across, 1, how | {"engine.precision": after}, str(tmp_path), 0, 4)[0]
    assert seen["scale"] == (256 if after == "fp16" else 1)
    assert seen["losses"] == pytest.approx(straight["losses"], abs=2e-2)
    assert seen["losses"][-1] < seen["losses"][0] - 0.1


def test_the_best_stays_beside_the_newest_and_is_loaded_by_its_step(tmp_path: Path) -> None:
    for seen in ranks.run(workers.best, 2, str(tmp_path)):
        assert seen["kept"] == [[1], [2, 1], [3, 2], [4, 3, 2], [5, 4, 2]]
        assert (seen["step"], seen["equal"]) == (2, [2])
        gone, other, torn = seen["refusals"]
        assert "step-00000003 cannot be loaded: it is not there" in gone
        assert "the optimizer was adamw, now lion" in other
        assert "bytes instead of" in torn
