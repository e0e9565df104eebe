"""DeepSpeed for real, over gloo: every ZeRO stage, precision and world trains the same."""

import math
from pathlib import Path

import pytest
import torch

from tests import ranks, workers
from vitdist import config, model, optim
from vitdist.engine import choose_precision, deepspeed_config

pytestmark = pytest.mark.processes

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.txt"
# fp32 over gloo, one thread a rank; sums run in another order at another stage or world: docs/architecture.md.
TOLERANCE = 1e-5
ACCUMULATED = {"train.accumulation": 2}


def golden() -> list[float]:
    return [float(line.split()[1]) for line in GOLDEN.read_text().splitlines() if line[0] != "#"]


@pytest.mark.parametrize(("zero", "world"), ranks.matrix({(0, 2), (1, 2), (2, 2), (3, 2), (2, 1)}, range(4), (1, 2, 4)))
def test_N4_losses_are_golden(zero: int, world: int) -> None:
    found = ranks.run(workers.losses, world, {"engine.zero": zero, **ACCUMULATED}, 10)[0]
    assert found == pytest.approx(golden(), abs=TOLERANCE)
    assert found[-1] < found[0] - 0.1


def test_clipping_bites_and_changes_the_losses() -> None:
    clipped = golden()
    free = ranks.run(workers.losses, 2, {"engine.zero": 2, "optim.clip": 0, **ACCUMULATED}, 10)[0]
    assert max(abs(a - b) for a, b in zip(clipped, free, strict=True)) > 10 * TOLERANCE


def test_fp16_overflow_is_skipped_and_not_counted() -> None:
    """A real ZeRO-2 run in fp16: see workers.allow_fp16_on_cpu."""
    changes = {
        "engine.zero": 2,
        "engine.precision": "fp16",
        "engine.loss_scale_hysteresis": 1,
        "engine.loss_scale_power": 12,
    }
    seen = ranks.run(workers.fp16_overflow, 2, changes)[0]
    assert seen["dtype"] == "torch.float16"
    assert seen["skipped"] == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    assert seen["scale"][:2] == [4096, 4096]
    assert seen["scale"][2:] == [2048] * 8
    assert seen["loss"][-1] < seen["loss"][0] - 0.1
    assert all(math.isfinite(loss) for loss in seen["loss"])
    s = workers.settings(**changes)
    applied = [0, 1, 2, 2, 3, 4, 5, 6, 7, 8]  # the step after the skipped one repeats its rate
    for step, rates in enumerate(seen["lr"]):
        expected = optim.schedule(applied[step], 20, s.optim)
        assert rates["03_head"] == pytest.approx(expected, rel=1e-12)
        assert rates["00_embeddings"] == pytest.approx(expected * 0.5**3, rel=1e-12)


@pytest.mark.parametrize("zero", [0, 3])
def test_fp16_trains_the_same_at_every_stage(zero: int) -> None:
    """DeepSpeed does not scale the loss without ZeRO, and unscales its gradients: see Engine.backward."""
    how = {"engine.precision": "fp16", "engine.loss_scale_power": 8, "optim.name": "sgd", "optim.lr": 0.1}
    expected = ranks.run(workers.fp16_norms, 1, how | {"engine.zero": 2}, 7)[0]
    found = ranks.run(workers.fp16_norms, 1, how | {"engine.zero": zero}, 7)[0]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], abs=1e-3)
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=1e-2)
    assert expected[-1][0] < expected[0][0] - 0.3
    assert all(norm > 0.5 for _, norm in expected), "nothing is clipped"


RESUMES = {
    (0, "fp16", 1, "sgd"),
    (0, "bf16", 1, "adamw"),
    (1, "fp32", 1, "adamw"),
    (2, "fp16", 2, "adamw"),
    (3, "fp16", 2, "lion"),
    (2, "bf16", 2, "sgd"),
}
OPTIMIZERS = ("adamw", "sgd", "lion")


@pytest.mark.parametrize(
    ("zero", "precision", "world", "name"),
    ranks.matrix(RESUMES, range(4), ("fp32", "bf16", "fp16"), (1, 2), OPTIMIZERS),
)
def test_groups_and_weights_survive_a_resume(tmp_path: Path, zero: int, precision: str, world: int, name: str) -> None:
    changes = {"engine.zero": zero, "engine.precision": precision, "optim.name": name}
    seen = ranks.run(workers.rates_after_resume, world, changes, str(tmp_path))[0]
    s = workers.settings(**changes)
    assert seen["resumed"] == 5
    assert len(set(seen["scales"].values())) == 4
    applied = 5 - seen["skipped"]
    for group, scale in seen["scales"].items():
        assert seen["before"][group] == pytest.approx(optim.schedule(applied - 1, 20, s.optim) * scale, rel=1e-12)
        assert seen["after"][group] == pytest.approx(optim.schedule(applied, 20, s.optim) * scale, rel=1e-12)
        assert seen["decays"][group] == (0.0 if group.endswith("_no_decay") else s.optim.weight_decay)
    net = model.skeleton(s.model, len(workers.CLASSES))
    rules = {n: workers.rule(n, p, s) for n, p in net.named_parameters()}
    for held in seen["members"]:
        assert sorted(n for names in held.values() for n in names) == sorted(rules)
        for group, names in held.items():
            assert {rules[n] for n in names} == {(seen["scales"][group], seen["decays"][group])}
    assert seen["continued"] == seen["straight"]
    assert seen["equal"]


ALIKE = {(0, "sgd", 1, 4), (1, "lion", 2, 1), (2, "sgd", 2, 2), (3, "adamw", 2, 1)}


@pytest.mark.parametrize(
    ("zero", "name", "world", "accumulation"), ranks.matrix(ALIKE, range(4), OPTIMIZERS, (1, 2), (1, 2, 4))
)
def test_updates_equal_those_of_plain_torch(
    tmp_path: Path, zero: int, name: str, world: int, accumulation: int
) -> None:
    """Rates, decay, clipping by the whole norm and accumulation of each parameter, over a resume."""
    changes = {
        "engine.zero": zero,
        "optim.name": name,
        "optim.lr": 0.1 if name == "sgd" else 3e-3,
        "optim.weight_decay": 0.3,
        "train.accumulation": accumulation,
    }
    seen = ranks.run(workers.against_torch, world, changes, str(tmp_path))[0]
    for ours, theirs in seen["norms"]:
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert theirs > 0.5, "nothing is clipped"
    for parameter, off in seen["off"].items():
        # A bias of the keys shifts all scores of a query alike: its gradient is noise, of which Adam makes steps.
        if not parameter.endswith("k_proj.bias"):
            assert off < 1e-3 * seen["moved"][parameter], parameter


@pytest.mark.parametrize(("zero", "precision"), ranks.matrix({(0, "bf16")}, range(4), ("fp32", "bf16", "fp16")))
def test_training_starts_at_the_given_weights_and_with_a_whole_step(zero: int, precision: str) -> None:
    """DeepSpeed's wrapper for half precision without ZeRO takes a step of its own before: see Engine."""
    changes = {
        "engine.zero": zero,
        "engine.precision": precision,
        "optim.weight_decay": 0.3,
        "engine.loss_scale_power": 10,
    }
    seen = ranks.run(workers.first_step, 1, changes)[0]
    assert seen["equal"]
    # Adam's first step moves each weight by the rate, whatever its gradient; as its second it would be 0.74 of it.
    assert seen["moved"] == pytest.approx(1.0, rel=0.02)


STREAKS = {(0, "bf16", True), (1, "bf16", False), (3, "fp32", False)}


@pytest.mark.parametrize(
    ("zero", "precision", "autocast"), ranks.matrix(STREAKS, range(4), ("fp32", "bf16", "fp16"), (False, True))
)
def test_gradients_that_are_not_finite_change_no_weight(zero: int, precision: str, autocast: bool) -> None:
    if autocast and precision != "bf16":
        pytest.skip("refused")
    changes = {"engine.zero": zero, "engine.precision": precision, "engine.autocast": str(autocast).lower()}
    seen = ranks.run(workers.ended_by, 1, changes, math.inf)[0]
    assert seen["fate"] == "skipped"
    assert seen["untouched"]


def test_one_asked_rank_stops_all() -> None:
    (first, first_reason), (second, second_reason) = ranks.run(workers.stop_flag, 2)
    assert (first, second) == (True, True)
    assert (first_reason, second_reason) == (None, "SIGUSR2")


def test_fp16_is_refused_where_the_device_cannot() -> None:
    assert "fp16 needs a GPU; use auto, bf16 or fp32" in ranks.run(workers.fp16_where_it_cannot, 1)[0]


@pytest.mark.parametrize("asked", ["fp16", "fp32"])
def test_autocast_is_refused_but_in_bf16(asked: str) -> None:
    with pytest.raises(ValueError, match=f"bf16 only, not in {asked}: use engine.precision=bf16, or autocast=false"):
        choose_precision(asked, torch.device("cpu"), autocast=True)


def test_autocast_keeps_the_weights_in_fp32() -> None:
    assert choose_precision("auto", torch.device("cpu"), autocast=True) == "bf16"
    s = workers.settings(**{"engine.autocast": "true", "engine.precision": "bf16"})
    told = deepspeed_config(s, config.split_batch(s.train, 2), "bf16")
    assert told["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert "bf16" not in told


def test_deepspeed_is_told_what_the_settings_say() -> None:
    s = workers.settings(**{"engine.zero": 3, "optim.clip": 0.7, "train.accumulation": 4})
    told = deepspeed_config(s, config.split_batch(s.train, 2), "fp16")
    assert told["train_micro_batch_size_per_gpu"] == 2
    assert told["gradient_accumulation_steps"] == 4
    assert told["gradient_clipping"] == 0.7
    assert told["zero_optimization"] == {"stage": 3}
    assert told["fp16"] == {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
    assert "scheduler" not in told
    assert "optimizer" not in told
