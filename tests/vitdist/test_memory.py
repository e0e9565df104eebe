"""Memory without torch: DeepSpeed's real buffers and files to the byte, what autograd saves, what makes a run fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import plan_workers, ranks, workers
from tests.vitdist.test_model import FAMILIES
from tests.vitdist.test_shapes import SIZES
from vitdist import config, cost, manifest, memory, model, shapes
from vitdist.config import Config, Lora, Model, Scratch
from vitdist.rundir import RunDir

ODD = "{patch_size: 8, width: 36, depth: 2, heads: 2, mlp_ratio: 2.9}"
WIDE = "{patch_size: 16, width: 390, depth: 2, heads: 6, mlp_ratio: 3.1}"  # with weights that ZeRO-3 does not keep
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"engine.precision": "fp32", "model.scratch": ODD},
    "bf16, SGD, accumulated": {"engine.precision": "bf16", "optim.name": "sgd", "train.accumulation": 2},
    "fp16, Lion, average": {"engine.precision": "fp16", "optim.name": "lion", "optim.ema": 0.9},
    "autocast": {"engine.precision": "bf16", "engine.autocast": "true"},
    "adapters": {"engine.precision": "fp16", "model.lora.rank": 3},
    "frozen": {"engine.precision": "bf16", "model.freeze": 2},
    "wide": {"engine.precision": "bf16", "model.scratch": WIDE, "model.image_size": 32},
    "one rate": {"engine.precision": "bf16", "optim.layer_decay": 1, "optim.name": "sgd", "optim.momentum": 0},
}
SAMPLE = {
    (0, 2, "fp16, Lion, average"),
    (1, 2, "bf16, SGD, accumulated"),
    (2, 2, "fp32"),
    (1, 1, "autocast"),
    (2, 2, "frozen"),
    (3, 2, "wide"),
    (3, 2, "adapters"),
}


def asked(kind: str, zero: int, folder: Path) -> dict[str, Any]:
    changes = {"engine.zero": zero, **KINDS[kind]}
    if "model.lora.rank" in changes or "model.freeze" in changes:
        net = model.build(Model(scratch=Scratch(patch_size=8, width=36, depth=2, heads=2), image_size=16), ["a"], 0)[0]
        net.save_pretrained(folder / "pretrained")
        changes |= {"model.scratch": "null", "model.pretrained": str(folder / "pretrained")}
    return changes


@pytest.mark.processes
@pytest.mark.parametrize(("zero", "world", "kind"), ranks.matrix(SAMPLE, range(4), (1, 2, 3), KINDS))
def test_buffers_and_files_are_deepspeeds_to_the_byte(tmp_path: Path, zero: int, world: int, kind: str) -> None:
    changes = asked(kind, zero, tmp_path)
    if world == 3:
        changes["train.global_batch"] = 12
    s = workers.settings(**changes)
    found = memory.estimate(s, len(workers.CLASSES), world)
    states = []
    for rank, real in enumerate(ranks.run(plan_workers.held, world, changes, str(tmp_path / "run"))):
        mine = memory.state(found.net, zero, world, found.precision, s.optim, s.engine.autocast, rank)
        states.append(mine)
        most, kept = found.gathered
        assert real == {
            **mine._asdict(),
            "buckets": found.buckets,
            "gathered": most,
            **({"kept": kept} if zero == 3 else {}),
        }
    assert sum(found.state) == max(map(sum, states))
    (entry,) = manifest.entries(RunDir(tmp_path / "run"), thorough=False)
    assert entry.manifest
    written = [entry.manifest.files[manifest.file_of(rank)].bytes for rank in range(world)]
    assert cost.checkpoint_files(s, found, cuda=torch.cuda.is_available()) == written


def test_zeros_sixteen_bytes_a_parameter() -> None:
    """Rajbhandari et al. 2020, section 3.1: 2 + 2 + 12 bytes a parameter, for Adam in mixed precision."""
    net = shapes.network(Model(scratch=Scratch(width=1024, depth=24, heads=16)), 1000)
    optim = workers.settings().optim
    whole = memory.state(net, 0, 1, "fp16", optim)
    assert sum(whole) / net.total == pytest.approx(16, rel=1e-4)
    assert whole.weights == whole.gradients == 2 * net.total
    assert whole.masters + whole.moments == pytest.approx(12 * net.total, rel=1e-5)
    assert sum(memory.state(net, 3, 64, "fp16", optim)) / net.total == pytest.approx(16 / 64, rel=0.01)
    for zero in (1, 2):
        held = memory.state(net, zero, 64, "fp16", optim)
        assert (sum(held) - held.gradients) / net.total == pytest.approx(2 + 12 / 64, rel=0.01)
        # Not 2 / 64: of each of 52 groups a rank holds whole tensors, however little of them is its own.
        assert 1 < held.gradients / net.total < 1.5


# ---- activations ---------------------------------------------------------------------------------


def measured(asked: Model, autocast: bool = False) -> int:
    """Bytes of the storages that a real graph of two images saves, beside parameters."""
    net = model.build(asked, list("abcde"), 0)[0]
    net = net if autocast else net.to(torch.bfloat16)
    known = {p.untyped_storage().data_ptr() for p in net.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    entered: list[torch.Tensor] = []
    if asked.gradient_checkpointing:  # what it keeps of a block is out of the hooks' sight: its input
        for block in model._blocks(net):
            block.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    images = torch.randn(2, 3, asked.image_size, asked.image_size)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        logits = net(pixel_values=images if autocast else images.bfloat16()).logits
    for tensor in entered:
        pack(tensor)
    assert logits.requires_grad
    return sum(sizes.values())


def off(asked: Model, autocast: bool = False) -> float:
    """Percent by which the formula is above what is measured."""
    found = memory.saved(shapes.network(asked, 5), "bf16", autocast, asked.gradient_checkpointing)
    return 100 * ((2 * found.image + found.fixed) / measured(asked, autocast) - 1)


@pytest.mark.parametrize(
    ("size", "checkpointing"), ranks.matrix({("Ti", False), ("Ti", True)}, ("Ti", "S", "B", "L"), (False, True))
)
def test_activations_are_what_autograd_saves(size: str, checkpointing: bool) -> None:
    """Above it by the norms' statistics, which a GPU keeps in fp32."""
    width, depth, heads = SIZES[size]
    shape = Scratch(width=width, depth=depth, heads=heads)
    assert 0 <= off(Model(scratch=shape, gradient_checkpointing=checkpointing)) < 0.3


def test_activations_under_autocast_and_at_another_size_and_pool() -> None:
    shape = Scratch(width=192, depth=4, heads=3)
    assert abs(off(Model(scratch=shape), autocast=True)) < 1
    assert 0 <= off(Model(scratch=shape, image_size=384)) < 0.3
    assert 0 <= off(Model(scratch=shape, pool="mean")) < 0.5


PARTIAL: dict[str, dict[str, Any]] = {
    "all": {},
    "frozen": {"freeze": 2},
    "adapters": {"lora": Lora(rank=8)},
    "many adapters": {"lora": Lora(rank=8, targets="all-linear")},
}


PAIRS = {
    ("vit", "frozen"),
    ("beit", "all"),
    ("beit shared", "frozen"),
    ("beit absolute", "adapters"),
    ("dinov2", "adapters"),
    ("dinov2 swiglu", "many adapters"),
    ("deit distilled", "all"),
}


@pytest.mark.parametrize(("family", "partial"), ranks.matrix(PAIRS, FAMILIES, PARTIAL))
def test_activations_of_every_family(tmp_path: Path, family: str, partial: str) -> None:
    prefix, kind, own = FAMILIES[family]
    shape = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 96, "patch_size": 8}
    config_ = getattr(transformers, f"{prefix}Config")(**(shape | own))
    config_.architectures = [f"{prefix}{kind}"]
    getattr(transformers, f"{prefix}{kind}")(config_).save_pretrained(tmp_path)
    # Learnt relative biases keep SDPA from its fused kernels on a CPU; on a GPU less may be kept.
    most = 15 if family in ("beit", "beit shared") else 1.5
    assert 0 <= off(Model(pretrained=str(tmp_path), image_size=96, **PARTIAL[partial])) < most


# ---- does it fit ------------------------------------------------------------------------------------


def large(*overrides: str) -> Config:
    raw: dict[str, Any] = {
        "data": {"train": "none", "val": "none"},
        "model": {"scratch": {"patch_size": 16, "width": 1024, "depth": 24, "heads": 16}},
        "train": {"global_batch": 4096, "epochs": 50},
    }
    return config.parse(Config, config.override(raw, overrides), "test")


def test_the_largest_micro_batch_is_the_largest() -> None:
    for overrides in ((), ("engine.zero=3",), ("model.gradient_checkpointing=true", "engine.zero=0")):
        found = memory.estimate(large(*overrides), 1000, 8)
        for memory_gb in (24, 40, 80):
            most = found.largest(memory_gb)
            fitting = memory.estimate(large(f"train.global_batch={8 * most}", *overrides), 1000, 8)
            above = memory.estimate(large(f"train.global_batch={8 * (most + 1)}", *overrides), 1000, 8)
            assert memory.fits(fitting, memory_gb)
            assert not memory.fits(above, memory_gb)
    assert memory.estimate(large(), 1000, 8).largest(3) == 0


def test_what_does_not_fit_is_told_how_it_would() -> None:
    s = large("engine.zero=0")
    found = memory.estimate(s, 1000, 8)
    assert found.batch.micro_batch == 512
    assert not memory.fits(found, 40)
    ways = memory.remedies(s, 1000, 8, 40)
    assert ways[0].overrides[:2] == ("train.global_batch=4096", "train.micro_batch=128")
    assert any("model.gradient_checkpointing=true" in way.overrides for way in ways)
    for way in ways:
        there = memory.estimate(large("engine.zero=0", *way.overrides), 1000, 8)
        assert memory.fits(there, 40)
        assert there.peak == way.peak
        assert there.batch.global_batch == 4096
    assert memory.remedies(s, 1000, 8, 1) == []


def test_more_sharding_and_recomputation_never_need_more_between_updates() -> None:
    held = [memory.estimate(large(f"engine.zero={zero}"), 1000, 8) for zero in range(4)]
    kept = [sum(found.state) - found.state.gradients for found in held]
    assert kept == sorted(kept, reverse=True)
    again = memory.estimate(large("model.gradient_checkpointing=true"), 1000, 8)
    assert again.peak < held[2].peak
    assert again.parts["activations"] < held[2].parts["activations"] / 10


def test_evaluation_may_be_the_fullest_moment() -> None:
    assert memory.estimate(large(), 1000, 64).moment == "forward and backward"
    found = memory.estimate(large("evaluation.batch=8192"), 1000, 64)
    assert found.moment == "evaluation"
    assert found.peak > 8192 * found.net.tokens * 10 * 1024 * 2
    assert found.largest(40) == 0


def test_precision_is_that_of_a_gpu_unless_told() -> None:
    assert memory.estimate(large(), 10, 1).precision == "fp16"
    assert memory.estimate(large("engine.precision=bf16"), 10, 1).precision == "bf16"
    assert memory.estimate(large("engine.autocast=true"), 10, 1).precision == "bf16"
    single = memory.estimate(large(), 10, 1, precision="fp32")
    assert single.state.weights == 4 * single.net.total


def test_shapes_that_are_not_known_are_refused_with_the_reason(tmp_path: Path) -> None:
    s = large("model.scratch=null", f"model.pretrained={tmp_path}")
    with pytest.raises(shapes.Unknown, match=r"config\.json cannot be read"):
        memory.estimate(s, 10, 1)
    with pytest.raises(config.SettingsError, match="does not divide over 3 ranks"):
        memory.estimate(large(), 10, 3)


# ---- cost ----------------------------------------------------------------------------------------------


def test_a_run_on_imagenet() -> None:
    s = large("train.micro_batch=64", "train.accumulation=2")
    found = memory.estimate(s, 1000, 32)
    told = cost.estimate(s, found, 1_281_167, cost.Assumed(mfu=0.5))
    assert told.updates == round(50 * 1_281_167 / 4096)
    assert told.flops_update == pytest.approx(4096 * 369.3e9, rel=1e-3)
    # FLOP over peak, and nothing else.
    assert told.gpu_hours == pytest.approx(50 * 1_281_167 * 369.3e9 / (395e12 * 3600), rel=1e-3)
    assert told.hours == pytest.approx(told.gpu_hours / 32)
    assert told.cores == pytest.approx(395e12 / 369.3e9 / 425, rel=1e-3)
    assert told.checkpoint == pytest.approx(12 * found.net.total, rel=1e-3)
    assert told.save_s == told.checkpoint / 0.5e9
    unknown = cost.estimate(s, found, None, cost.Assumed())
    assert (unknown.updates, unknown.hours, unknown.gpu_hours, unknown.flops_run) == (None, None, None, None)


def test_recomputation_costs_a_third_more_time() -> None:
    times = []
    for again in ("false", "true"):
        s = large(f"model.gradient_checkpointing={again}")
        times.append(cost.estimate(s, memory.estimate(s, 1000, 8), 1000, cost.Assumed()).hours or 0)
    assert times[1] / times[0] == pytest.approx(4 / 3)


def test_what_each_stage_sends() -> None:
    half = 2 * memory.estimate(large(), 1000, 1).net.total
    times = {0: 2, 1: 3, 2: 2 * 4 + 1, 3: 2 * 4}
    for zero, each in times.items():
        found = memory.estimate(large(f"engine.zero={zero}", "train.accumulation=4"), 1000, 8)
        assert cost.sent(found) == round(each * half * 7 / 8)
    assert cost.sent(memory.estimate(large(), 1000, 1)) == 0


def test_every_augmentation_has_a_rate() -> None:
    data = large().data
    for kind in ("none", "trivial", "rand-m9-mstd0.5", "v0", "v0r", "original", "originalr", "3a", "augmix-m3"):
        rate = cost.decoded(data.model_copy(update={"auto_augment": kind}))
        assert rate >= cost.decoded(data.model_copy(update={"auto_augment": kind, "colour_jitter": 0.3}))
    assert json.loads(json.dumps(rate)) > 0
