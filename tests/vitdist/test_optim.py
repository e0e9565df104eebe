"""Layer numbers, groups, weight decay and the schedule, without DeepSpeed."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitdist import model, optim
from vitdist.config import Model, Optim, Scratch


def vit(depth: int, width: int = 64, heads: int = 4, image_size: int = 32, patch_size: int = 8) -> torch.nn.Module:
    shape = Scratch(patch_size=patch_size, width=width, depth=depth, heads=heads)
    with torch.device("meta"):
        return model.build(Model(scratch=shape, image_size=image_size), ["a", "b"], seed=0)[0]


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


@given(st.integers(1, 500), st.sampled_from(["cosine", "linear", "constant"]), st.floats(0, 0.9), st.floats(0, 1))
def test_schedule_rises_to_the_peak_once_and_ends_at_the_floor(
    total: int, kind: str, warmup: float, floor: float
) -> None:
    s = Optim(lr=2.0, schedule=kind, warmup=warmup, min_lr=floor)  # type: ignore[arg-type]
    rates = [optim.schedule(step, total, s) for step in range(total)]
    steps = round(warmup * total)
    assert rates[:steps] == pytest.approx([2.0 * (i + 1) / steps for i in range(steps)])
    assert all(2.0 * floor - 1e-9 <= rate <= 2.0 + 1e-9 for rate in rates[steps:])
    assert all(a >= b - 1e-12 for a, b in zip(rates[steps:], rates[steps + 1 :], strict=False))
    if total - steps > 1:
        assert rates[-1] == pytest.approx(2.0 if kind == "constant" else 2.0 * floor, abs=1e-9)


def test_cosine_equals_torch() -> None:
    s = Optim(lr=0.5, warmup=0.0, min_lr=0.1)
    weight = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([weight], lr=0.5)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=99, eta_min=0.05)
    for step in range(100):
        assert math.isclose(optim.schedule(step, 100, s), sgd.param_groups[0]["lr"], rel_tol=1e-9)
        sgd.step()
        reference.step()


def test_flops_of_vit_large_are_369_gflop() -> None:
    large = vit(24, width=1024, heads=16, image_size=224, patch_size=16)
    assert model.flops_per_image(large) == pytest.approx(369.3e9, rel=1e-3)
