"""DeepSpeed for real, over gloo: every ZeRO stage, precision and world trains the same."""

import math
from pathlib import Path

import pytest

from tests import ranks, workers
from vitdist import config, optim
from vitdist.engine import deepspeed_config

pytestmark = pytest.mark.processes

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.txt"
# fp32 over gloo, one thread a rank; sums run in another order at another stage or world: docs/architecture.md.
TOLERANCE = 1e-5
ACCUMULATED = {"train.accumulation": 2}


def golden() -> list[float]:
    return [float(line.split()[1]) for line in GOLDEN.read_text().splitlines() if line[0] != "#"]


@pytest.mark.parametrize(("zero", "world"), ranks.matrix({(0, 2), (1, 2), (2, 2), (3, 2), (2, 1)}, range(4), (1, 2, 4)))
def test_losses_are_golden(zero: int, world: int) -> None:
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


RESUMES = {(0, "fp32", 2), (1, "fp32", 1), (2, "fp16", 2), (3, "fp32", 2), (2, "bf16", 2)}


@pytest.mark.parametrize(
    ("zero", "precision", "world"), ranks.matrix(RESUMES, range(4), ("fp32", "bf16", "fp16"), (1, 2))
)
def test_rates_and_weights_survive_a_resume(tmp_path: Path, zero: int, precision: str, world: int) -> None:
    changes = {"engine.zero": zero, "engine.precision": precision}
    seen = ranks.run(workers.rates_after_resume, world, changes, str(tmp_path))[0]
    s = workers.settings(**changes)
    assert seen["resumed"] == 5
    assert len(set(seen["scales"].values())) == 4
    for name, scale in seen["scales"].items():
        assert seen["before"][name] == pytest.approx(optim.schedule(4, 20, s.optim) * scale, rel=1e-12)
        assert seen["after"][name] == pytest.approx(optim.schedule(5, 20, s.optim) * scale, rel=1e-12)
        assert seen["decays"][name] == (0.0 if name.endswith("_no_decay") else s.optim.weight_decay)
    assert seen["continued"] == seen["straight"]
    assert seen["equal"]


def test_a_checkpoint_of_other_groups_is_refused(tmp_path: Path) -> None:
    ranks.run(workers.rates_after_resume, 1, {}, str(tmp_path))
    assert "groups was" in ranks.run(workers.resume_with, 1, {"optim.layer_decay": 0.9}, str(tmp_path))[0]
    assert "world was 1, now 2" in ranks.run(workers.resume_with, 2, {}, str(tmp_path))[0]


def test_a_torn_checkpoint_is_passed_over_and_never_silently(tmp_path: Path) -> None:
    ranks.run(workers.rates_after_resume, 1, {}, str(tmp_path))
    victim = next((tmp_path / "checkpoints" / "step-00000005" / "state").glob("*optim*"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-7])
    assert "bytes instead of" in ranks.run(workers.resume_with, 1, {}, str(tmp_path))[0]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    victim.write_bytes(flipped)
    assert "other content" in ranks.run(workers.resume_with, 1, {}, str(tmp_path))[0]
    victim.write_bytes(whole)
    assert "resumed at 5" in ranks.run(workers.resume_with, 1, {}, str(tmp_path))[0]


def test_one_asked_rank_stops_all() -> None:
    (first, first_reason), (second, second_reason) = ranks.run(workers.stop_flag, 2)
    assert (first, second) == (True, True)
    assert (first_reason, second_reason) == (None, "SIGUSR2")


def test_fp16_is_refused_where_the_device_cannot() -> None:
    assert "fp16 needs a GPU; use auto, bf16 or fp32" in ranks.run(workers.fp16_where_it_cannot, 1)[0]


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
