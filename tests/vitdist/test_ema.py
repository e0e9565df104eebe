"""The average of the fp32 weights: exact in every stage, precision and world, through resumes and skipped updates."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import ranks, workers
from vitdist import model
from vitdist.config import Optim
from vitdist.engine import average_decay

pytestmark = pytest.mark.processes

EMA = {"optim.ema": 0.9, "engine.loss_scale_hysteresis": 1, "engine.loss_scale_power": 12}


@given(st.integers(0, 10**6), st.floats(0.05, 0.99999))
def test_the_decay_rises_to_what_is_asked(update: int, ema: float) -> None:
    assert average_decay(0, Optim(ema=ema)) == min(ema, 0.1)
    decay = average_decay(update, Optim(ema=ema))
    assert decay == (ema if (1 + update) / (10 + update) > ema else (1 + update) / (10 + update))
    assert average_decay(update + 1, Optim(ema=ema)) >= decay
    assert average_decay(update, Optim(ema=ema, ema_warmup=False)) == ema


def check(seen: dict, precision: str) -> None:
    # fp32 beside float64: 6 updates of at most 2^-24 of weights below 2 each.
    assert seen["off"] < 5e-7
    assert seen["far"] > 1e-3, "the average is the last weights: nothing is tested"
    assert seen["restored"], "the weights after `averaged` are not those before"
    assert seen["resumed"]
    assert seen["continued"]
    # The model computes with the averages, rounded as its weights are; autocast rounds elsewhere than a bf16 model.
    assert seen["logits_off"] < (0.02 if "autocast" in precision else 1e-5)
    assert seen["logits_far"] > 0.025


AVERAGES = {(0, "fp16", 1), (1, "bf16", 2), (2, "bf16 autocast", 1), (3, "fp16", 2)}


@pytest.mark.parametrize(
    ("zero", "precision", "world"),
    ranks.matrix(AVERAGES, range(4), ("fp32", "bf16", "fp16", "bf16 autocast"), (1, 2, 4)),
)
def test_the_average_equals_float64(tmp_path: Path, zero: int, precision: str, world: int) -> None:
    kind, _, autocast = precision.partition(" ")
    changes = {**EMA, "engine.zero": zero, "engine.precision": kind, "engine.autocast": str(bool(autocast)).lower()}
    skip = 2 if kind == "fp16" else None
    seen = ranks.run(workers.average, world, changes, str(tmp_path), skip)[0]
    assert (seen["applied"], seen["skipped"]) == ((5, 1) if skip else (6, 0))
    check(seen, precision)


def test_the_average_without_warmup(tmp_path: Path) -> None:
    check(ranks.run(workers.average, 1, {**EMA, "optim.ema_warmup": "false"}, str(tmp_path))[0], "fp32")


PARTS = {(3, "bf16", "model.lora.rank=4")}


@pytest.mark.parametrize(
    ("zero", "precision", "part"),
    ranks.matrix(PARTS, range(4), ("fp32", "bf16"), ("model.freeze=2", "model.freeze=all", "model.lora.rank=4")),
)
def test_frozen_weights_are_saved_and_exported_as_they_are(
    tmp_path: Path, zero: int, precision: str, part: str
) -> None:
    shape = workers.settings().model
    model.build(shape, workers.CLASSES, seed=5)[0].save_pretrained(tmp_path / "pretrained")
    name, value = part.split("=")
    changes = {
        **EMA,
        "engine.zero": zero,
        "engine.precision": precision,
        "model.scratch": "null",
        "model.pretrained": str(tmp_path / "pretrained"),
        name: value,
    }
    check(ranks.run(workers.average, 2, changes, str(tmp_path))[0], precision)
    weights = ranks.run(workers.across, 2, changes, str(tmp_path / "other"), 3, 0)[0]["average"]
    began, _ = model.build(workers.settings(**changes).model, workers.CLASSES, workers.settings().train.seed)
    rounded = torch.bfloat16 if precision == "bf16" else torch.float32
    for key, parameter in began.named_parameters():
        if not parameter.requires_grad:
            assert np.array_equal(weights[key], parameter.detach().to(rounded).float().numpy()), key


def test_an_average_that_is_turned_on_later_begins_with_the_weights_then(tmp_path: Path) -> None:
    how = {"optim.ema_warmup": "false"}
    ranks.run(workers.across, 1, {}, str(tmp_path), 4, 0)
    before = ranks.run(workers.across, 1, {}, str(tmp_path), 0, 0)[0]["weights"]
    seen = ranks.run(workers.across, 2, how | {"optim.ema": 0.75, "engine.zero": 3}, str(tmp_path), 0, 1)[0]
    assert seen["resumed"] == 4
    for name, average in seen["average"].items():
        expected = 0.75 * before[name].astype(np.float64) + 0.25 * seen["weights"][name]
        assert np.abs(average - expected).max() < 1e-6
    assert any(np.abs(seen["weights"][name] - before[name]).max() > 1e-3 for name in before)
