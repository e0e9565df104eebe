"""Layer numbers, groups, weight decay and the schedule, without DeepSpeed."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import Lion, param_groups_layer_decay
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from vitdist import config, model, optim
from vitdist.config import Lora, Model, Optim, Scratch


def vit(depth: int, width: int = 64, heads: int = 4, image_size: int = 32, patch_size: int = 8) -> torch.nn.Module:
    shape = Scratch(patch_size=patch_size, width=width, depth=depth, heads=heads)
    return model.skeleton(Model(scratch=shape, image_size=image_size), 2)


def grouped(depth: int, **settings: float) -> list[dict]:
    net = vit(depth)
    layer, found = model.layers(net)
    return optim.groups(net, layer, found, Optim(**settings), model.layer_name)


def test_vit_large_has_52_groups_with_the_scales_of_mae() -> None:
    groups = grouped(24, layer_decay=0.75)
    assert len(groups) == 52
    scales = {g["name"]: g["lr_scale"] for g in groups}
    # MAE's util/lr_decay.py at ViT-L: 0.75^(25 - id)
    expected = {
        "00_embeddings": 7.525e-4,
        "01_block": 1.0034e-3,
        "12_block": 0.023757,
        "23_block": 0.5625,
        "24_block": 0.75,
        "25_head": 1.0,
    }
    assert {name: scales[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_the_names_before_transformers_5_9_give_the_same_groups() -> None:
    """`vit.encoder.layer.N` instead of `vit.layers.N`: layers are read off the tree, not off names."""
    net = vit(24)
    net.vit.encoder = torch.nn.Module()
    net.vit.encoder.layer = net.vit.layers
    del net.vit.layers
    layer, depth = model.layers(net)
    groups = optim.groups(net, layer, depth, Optim(), model.layer_name)
    assert any(name.startswith("vit.encoder.layer.23.") for name in groups[-3]["names"])
    assert [(g["name"], g["lr_scale"], len(g["names"])) for g in groups] == [
        (g["name"], g["lr_scale"], len(g["names"])) for g in grouped(24)
    ]
    assert len(groups) == 52


NAMES_IN_TIMM = {
    r"^vit\.embeddings\.cls_token": "cls_token",
    r"^vit\.embeddings\.position_embeddings": "pos_embed",
    r"^vit\.embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"^vit\.layers\.(\d+)\.layernorm_before": r"blocks.\1.norm1",
    r"^vit\.layers\.(\d+)\.layernorm_after": r"blocks.\1.norm2",
    r"^vit\.layers\.(\d+)\.attention\.[qkv]_proj": r"blocks.\1.attn.qkv",
    r"^vit\.layers\.(\d+)\.attention\.o_proj": r"blocks.\1.attn.proj",
    r"^vit\.layers\.(\d+)\.mlp": r"blocks.\1.mlp",
    r"^vit\.layernorm": "norm",
    r"^classifier": "head",
}


@pytest.mark.parametrize(("size", "depth", "width", "heads"), [("base", 12, 768, 12), ("large", 24, 1024, 16)])
def test_groups_equal_those_of_timm_but_for_the_final_norm(size: str, depth: int, width: int, heads: int) -> None:
    net = vit(depth, width, heads, image_size=224, patch_size=16)
    layer, found = model.layers(net)
    settings = Optim(layer_decay=0.65, weight_decay=0.03)
    ours = {
        name: (g["lr_scale"], g["weight_decay"])
        for g in optim.groups(net, layer, found, settings, model.layer_name)
        for name in g["names"]
    }
    with torch.device("meta"):
        other = timm.create_model(f"vit_{size}_patch16_224", num_classes=2)
    name_of = {id(p): name for name, p in other.named_parameters()}
    theirs = {
        name_of[id(p)]: (g["lr_scale"], g["weight_decay"])
        for g in param_groups_layer_decay(other, 0.03, other.no_weight_decay(), layer_decay=0.65)
        for p in g["params"]
    }
    pairs = {}
    for name in ours:
        mapped = [re.sub(old, new, name) for old, new in NAMES_IN_TIMM.items() if re.search(old, name)]
        assert len(mapped) == 1, name
        pairs[name] = mapped[0]
    assert set(pairs.values()) == set(theirs)
    differ = {name for name, timms in pairs.items() if ours[name] != pytest.approx(theirs[timms])}
    # timm merges the final norm with the last block; BEiT and MAE, and so we, count it with the head.
    assert differ == {"vit.layernorm.weight", "vit.layernorm.bias"}
    assert {(ours[name], theirs[pairs[name]]) for name in differ} == {((1.0, 0.0), (0.65, 0.0))}


@pytest.mark.parametrize(
    ("family", "changes", "bare"),
    [
        ("ViT", {}, {"cls_token", "position_embeddings"}),
        ("DeiT", {}, {"cls_token", "distillation_token", "position_embeddings"}),
        (
            "Beit",
            {"use_relative_position_bias": True, "use_mask_token": True, "use_absolute_position_embeddings": True},
            {"cls_token", "mask_token", "position_embeddings", "relative_position_bias_table"},
        ),
        ("Dinov2WithRegisters", {}, {"cls_token", "mask_token", "position_embeddings", "register_tokens"}),
        ("ViTMSN", {}, {"cls_token", "position_embeddings"}),
    ],
)
def test_tokens_and_positions_of_every_family_are_not_decayed(family: str, changes: dict, bare: set[str]) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    settings = getattr(transformers, f"{family}Config")(**shape, **changes)
    with torch.device("meta"):
        net = getattr(transformers, f"{family}ForImageClassification")(settings)
    for name, parameter in net.named_parameters():
        matrix = name.endswith("weight") and parameter.ndim > 1
        assert optim.decays(name, parameter) == matrix, name
    found = {n.rpartition(".")[2] for n, p in net.named_parameters() if p.ndim > 1 and not optim.decays(n, p)}
    assert found == bare


def test_adapters_are_decayed_and_what_they_adapt_is_in_no_group(tmp_path: Path) -> None:
    shape = Scratch(patch_size=8, width=32, depth=2, heads=2)
    model.build(Model(scratch=shape, image_size=16), ["a", "b"], seed=0)[0].save_pretrained(tmp_path)
    net = model.skeleton(Model(pretrained=str(tmp_path), image_size=16, lora=Lora(rank=4)), 2)
    layer, depth = model.layers(net)
    groups = optim.groups(net, layer, depth, Optim(), model.layer_name)
    assert [(g["name"], len(g["names"])) for g in groups] == [
        ("01_block", 4),
        ("02_block", 4),
        ("03_head", 1),
        ("03_head_no_decay", 1),
    ]
    assert all("lora_" in name for g in groups[:2] for name in g["names"])


def test_every_parameter_is_in_the_group_of_its_layer_and_none_twice() -> None:
    net = vit(3)
    layer, depth = model.layers(net)
    groups = optim.groups(net, layer, depth, Optim(), model.layer_name)
    names = [name for g in groups for name in g["names"]]
    assert sorted(names) == sorted(name for name, _ in net.named_parameters())
    for g in groups:
        for name in g["names"]:
            block = re.search(r"layers?\.(\d+)\.", name)
            number = int(block.group(1)) + 1 if block else 0 if ".embeddings." in name else depth + 1
            assert g["name"].startswith(f"{number:02d}_"), (name, g["name"])
            plain = name.endswith("weight") and "norm" not in name
            assert (g["weight_decay"] > 0) == plain, name


def test_frozen_layers_make_no_empty_group() -> None:
    net = vit(3)
    layer, depth = model.layers(net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(layer[name] > 1)
    groups = optim.groups(net, layer, depth, Optim(), model.layer_name)
    assert [g["name"] for g in groups] == [
        "02_block",
        "02_block_no_decay",
        "03_block",
        "03_block_no_decay",
        "04_head",
        "04_head_no_decay",
    ]
    assert all(g["params"] for g in groups)


def test_a_parameter_that_no_rule_names_is_an_error() -> None:
    net = vit(2)
    net.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="no layer is known for extra"):
        model.layers(net)
    with pytest.raises(ValueError, match="not a ViT"):
        model.layers(torch.nn.ModuleDict({"base_model": torch.nn.Linear(2, 2)}))


KINDS = ["cosine", "linear", "constant", "wsd"]


@given(st.integers(1, 500), st.sampled_from(KINDS), st.floats(0, 0.7), st.floats(0.05, 0.3), st.floats(0, 1))
def test_schedule_rises_to_the_peak_once_and_ends_at_the_floor(
    total: int, kind: str, warmup: float, fall: float, floor: float
) -> None:
    s = Optim(lr=2.0, schedule=kind, warmup=warmup, fall=fall, min_lr=floor)  # type: ignore[arg-type]
    rates = [optim.schedule(step, total, s) for step in range(total)]
    steps = round(warmup * total)
    assert rates[:steps] == pytest.approx([2.0 * (i + 1) / steps for i in range(steps)])
    assert all(2.0 * floor - 1e-9 <= rate <= 2.0 + 1e-9 for rate in rates[steps:])
    assert all(a >= b - 1e-12 for a, b in zip(rates[steps:], rates[steps + 1 :], strict=False))
    if steps < total:
        assert rates[steps] == pytest.approx(2.0) or kind == "wsd"
    if total - steps > 1 and (kind != "wsd" or round(fall * total)):
        assert rates[-1] == pytest.approx(2.0 if kind == "constant" else 2.0 * floor, abs=1e-9)


def rates_of_torch(build: Callable[[torch.optim.Optimizer], LRScheduler], lr: float, count: int) -> list[float]:
    """The rate of each update under a scheduler of torch."""
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = build(sgd), []
    for _ in range(count):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    return rates


AFTER_THE_WARMUP: dict[str, tuple[Callable[[torch.optim.Optimizer], list[LRScheduler]], list[int]]] = {
    "cosine": (lambda o: [lr_scheduler.CosineAnnealingLR(o, T_max=89, eta_min=0.05)], []),
    "linear": (lambda o: [lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=89)], []),
    "constant": (lambda o: [lr_scheduler.ConstantLR(o, 1.0)], []),
    "wsd": (lambda o: [lr_scheduler.ConstantLR(o, 1.0), lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=30)], [69]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_and_schedule_equal_those_of_torch(kind: str) -> None:
    parts, milestones = AFTER_THE_WARMUP[kind]

    def reference(o: torch.optim.Optimizer) -> LRScheduler:
        warmup = lr_scheduler.LinearLR(o, start_factor=1 / 10, end_factor=1.0, total_iters=9)
        return lr_scheduler.SequentialLR(o, [warmup, *parts(o)], milestones=[10, *milestones])

    s = Optim(lr=0.5, schedule=kind, warmup=0.1, fall=0.3, min_lr=0.1)  # type: ignore[arg-type]
    ours = [optim.schedule(step, 100, s) for step in range(100)]
    assert ours == pytest.approx(rates_of_torch(reference, 0.5, 100), rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("cosine", lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8, eta_min=0.05)),
        ("linear", lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=8)),
    ],
)
def test_by_epoch_each_pass_has_the_rate_that_torch_gives_an_epoch(
    kind: str, reference: Callable[[torch.optim.Optimizer], LRScheduler]
) -> None:
    """10 epochs of 7 updates, of which 2 are the warm-up; the last keeps its rate to the end."""
    s = Optim(lr=0.5, schedule=kind, schedule_by="epoch", warmup=0.2, min_lr=0.1)  # type: ignore[arg-type]
    ours = [optim.schedule(step, 70, s, 7.0) for step in range(70)]
    assert ours[:14] == pytest.approx([0.5 * (i + 1) / 14 for i in range(14)])
    assert ours[14:] == pytest.approx([rate for rate in rates_of_torch(reference, 0.5, 8) for _ in range(7)], rel=1e-9)


@given(st.integers(2, 400), st.floats(0.3, 60), st.floats(0, 0.5), st.sampled_from(KINDS))
def test_by_epoch_the_rate_changes_only_between_passes(total: int, length: float, warmup: float, kind: str) -> None:
    s = Optim(schedule=kind, schedule_by="epoch", warmup=warmup, fall=0.4)  # type: ignore[arg-type]
    steps = round(warmup * total)
    for step in range(max(1, steps + 1), total):
        same_pass = math.floor(step / length) == math.floor((step - 1) / length)
        before, now = (optim.schedule(at, total, s, length) for at in (step - 1, step))
        assert now == before if same_pass else now <= before


def test_a_warmup_that_ends_within_a_pass_is_followed_by_the_peak() -> None:
    s = Optim(lr=1.0, schedule="linear", schedule_by="epoch", warmup=0.25, min_lr=0.0)
    rates = [optim.schedule(step, 20, s, 8.0) for step in range(20)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, *[1] * 3, *[1 - 3 / 15] * 8, *[1 - 11 / 15] * 4])


def test_a_pass_begins_with_the_first_update_that_is_wholly_its_own() -> None:
    s = Optim(lr=1.0, schedule="linear", schedule_by="epoch", warmup=0.0, min_lr=0.0)
    rates = [optim.schedule(step, 10, s, 2.5) for step in range(10)]
    assert rates == pytest.approx([1, 1, 1, 0.7, 0.7, 0.5, 0.5, 0.5, 0.2, 0.2])


def test_rates_follow_the_batch() -> None:
    s = Optim(lr=1e-3, lr_batch=256)
    assert config.scaled(s, 1024).lr == pytest.approx(4e-3)
    assert config.scaled(s.model_copy(update={"lr_scaling": "sqrt"}), 1024).lr == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("settings", "kind", "told"),
    [
        ({}, torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8, "fused": False}),
        ({"betas": (0.8, 0.95), "eps": 1e-6}, torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6}),
        ({"name": "sgd"}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "dampening": 0}),
        ({"name": "sgd", "momentum": 0.0}, torch.optim.SGD, {"momentum": 0.0, "nesterov": False}),
        ({"name": "lion"}, Lion, {"betas": (0.9, 0.99)}),
        ({"name": "lion", "betas": (0.95, 0.98)}, Lion, {"betas": (0.95, 0.98)}),
    ],
)
def test_the_optimizer_is_what_the_settings_say(settings: dict, kind: type, told: dict) -> None:
    s = Optim(**settings, layer_decay=0.5)
    net = model.build(Model(scratch=Scratch(patch_size=8, width=32, depth=2, heads=2), image_size=16), ["a", "b"], 0)[0]
    groups = optim.groups(net, *model.layers(net), s, model.layer_name)
    made = optim.optimizer(groups, s, torch.device("cpu"))
    assert type(made) is kind
    assert [(g["lr"], g["weight_decay"], g["params"]) for g in made.param_groups] == [
        (g["lr"], g["weight_decay"], g["params"]) for g in groups
    ]
    for group in made.param_groups:
        assert {name: group[name] for name in told} == told


def test_flops_of_vit_large_are_369_gflop() -> None:
    large = vit(24, width=1024, heads=16, image_size=224, patch_size=16)
    assert model.flops_per_image(large) == pytest.approx(369.3e9, rel=1e-3)
