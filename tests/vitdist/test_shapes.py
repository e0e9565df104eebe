"""Shapes without torch: the same names, shapes, order, layers, groups and FLOP as the models that are built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from tests.vitdist.test_model import COMMON, FAMILIES
from tests.vitdist.test_weights import SMALL, TOLD
from vitdist import model, optim, shapes
from vitdist.config import Lora, Model, Optim, Scratch

SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}


def same(asked: Model, classes: int = 7) -> shapes.Network:
    """Hold the torch-free network against the skeleton of the real one."""
    net, mine = model.skeleton(asked, classes), shapes.network(asked, classes)
    layer, depth = model.layers(net)
    real = [(n, tuple(p.shape), layer[n], p.requires_grad) for n, p in net.named_parameters()]
    assert [(p.name, p.shape, p.layer, p.trained) for p in mine.parameters] == real
    assert not list(net.named_buffers())
    groups = optim.groups(net, layer, depth, Optim(), model.layer_name)
    assert [[p.name for p in group] for group in mine.groups()] == [group["names"] for group in groups]
    assert mine.flops == model.flops_per_image(net)
    linear = (torch.nn.Linear, torch.nn.Conv2d)
    of_linears = {f"{n}.{k}" for n, m in net.named_modules() if isinstance(m, linear) for k, _ in m.named_parameters()}
    assert {p.name for p in mine.parameters if p.linear} == of_linears
    return mine


@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_vit(size: str) -> None:
    width, depth, heads = SIZES[size]
    asked = Model(scratch=Scratch(patch_size=14 if size == "H" else 16, width=width, depth=depth, heads=heads))
    same(asked, 1000)
    same(asked.model_copy(update={"pool": "mean"}), 1000)


def test_published_numbers() -> None:
    """timm's tables: parameters with 1,000 classes, and multiply-adds at 224 px (61.6 and 17.6 "GFLOPs")."""
    for size, (millions, giga) in {
        "Ti": (5.717, 1.26),
        "S": (22.05, 4.61),
        "B": (86.57, 17.6),
        "L": (304.33, 61.6),
    }.items():
        width, depth, heads = SIZES[size]
        net = shapes.network(Model(scratch=Scratch(width=width, depth=depth, heads=heads)), 1000)
        assert net.total / 1e6 == pytest.approx(millions, rel=1e-3)
        assert net.macs / 1e9 == pytest.approx(giga, rel=6e-3)  # timm counts norms too
        assert net.flops == 6 * net.macs


def folder(place: Path, family: str, **changes: Any) -> str:
    """A folder with a configuration alone."""
    prefix, kind, own = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**(COMMON | own | changes))
    config.architectures = [f"{prefix}{kind}"]
    config.save_pretrained(place)
    return str(place)


CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "larger": {"image_size": 48},
    "probe": {"freeze": "all"},
    "frozen from below": {"freeze": 2},
    "adapters": {"lora": Lora(rank=3)},
    "many adapters": {"lora": Lora(rank=2, targets="all-linear")},
    "adapters of attention": {"lora": Lora(rank=2, targets="attention")},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path: Path, family: str) -> None:
    path = folder(tmp_path, family)
    for changes in CHANGES.values():
        same(Model(**({"pretrained": path, "image_size": 32} | changes)))
    for pool in ("cls", "mean"):
        asked = Model(pretrained=path, image_size=32, pool=pool)  # type: ignore[arg-type]
        if family.startswith("dinov2") or (family.startswith("deit") and pool == "mean"):
            with pytest.raises(ValueError, match="pools its own way; use auto"):
                shapes.network(asked, 7)
        else:
            same(asked)


def test_mae_and_what_a_configuration_leaves_out(tmp_path: Path) -> None:
    transformers.ViTMAEConfig(**(COMMON | {"intermediate_size": 64})).save_pretrained(tmp_path)
    same(Model(pretrained=str(tmp_path), image_size=32, pool="mean"))
    for family in ("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "vit_msn"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        same(Model(pretrained=str(tmp_path), image_size=224 if family != "dinov2" else 518))


def test_an_id_that_was_fetched_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path, "dinov2")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda source, name: f"{path}/{name}" if source == "a/b" else None
    )
    assert shapes.network(Model(pretrained="a/b", image_size=32), 7).family == "dinov2"


FILES: dict[str, Any] = {
    "vit": lambda: VisionTransformer(**SMALL),
    "mean": lambda: VisionTransformer(**SMALL, global_pool="avg"),
    "no bias": lambda: VisionTransformer(**SMALL, qkv_bias=False),
    "LayerScale": lambda: VisionTransformer(**SMALL, init_values=0.5),
    "LayerScale, no head": lambda: VisionTransformer(**(SMALL | {"num_classes": 0}), init_values=0.5),
    "registers": lambda: VisionTransformer(**(SMALL | {"num_classes": 0}), init_values=0.5, reg_tokens=2),
    "wide": lambda: VisionTransformer(**SMALL, mlp_ratio=3.5),
    "distilled": lambda: VisionTransformerDistilled(**SMALL),
    "beit": lambda: Beit(**SMALL, init_values=0.5, use_abs_pos_emb=False, use_rel_pos_bias=True),
    "beit shared": lambda: Beit(**SMALL, init_values=0.5, use_abs_pos_emb=False, use_shared_rel_pos_bias=True),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_weights(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.safetensors"
    save_file({f"module.{k}": v.contiguous().clone() for k, v in FILES[kind]().state_dict().items()}, path)
    same(Model(pretrained=str(path), image_size=32, **TOLD))
    same(Model(pretrained=str(path), image_size=48, **TOLD))


def test_what_cannot_be_known_says_why(tmp_path: Path) -> None:
    def reason(place: Path | str, **more: Any) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            shapes.network(Model(pretrained=str(place), **more), 3)
        return str(caught.value)

    assert "is a pickle, whose shapes only torch reads" in reason(tmp_path / "w.pth", **TOLD)
    assert "w.safetensors cannot be read: No such file" in reason(tmp_path / "w.safetensors", **TOLD)
    assert "no such folder" in reason(tmp_path / "absent")
    assert "config.json cannot be read" in reason(tmp_path)
    assert "nobody/nothing-of-this-name is not in the local cache" in reason("nobody/nothing-of-this-name")
    for content, told in {
        '{"model_type": "bert"}': "type 'bert', not one of: vit",
        '{"model_type": "vit", "image_size": [224, 112]}': "not for square pictures",
        '{"model_type": "vit", "hidden_size": "wide"}': "is no configuration of a model",
        "[1]": "is no configuration of a model",
        "{": "is no configuration of a model",
    }.items():
        (tmp_path / "config.json").write_text(content)
        assert told in reason(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit", "patch_size": 16}')
    assert "image_size 100 is not a multiple" in reason(tmp_path, image_size=100)
    torn = tmp_path / "t.safetensors"
    for bytes_ in (
        b"",
        b"\xff" * 100,
        (20).to_bytes(8, "little") + b"{} no json at all   ",
        (4).to_bytes(8, "little") + b"[{}]",
    ):
        torn.write_bytes(bytes_)
        assert "is no .safetensors file" in reason(torn, **TOLD)
    save_file({"x.weight": torch.zeros(2)}, torn)
    assert "no blocks.0.norm1.weight" in reason(torn, **TOLD)
    save_file({"blocks.0.norm1.weight": torch.zeros(2)}, torn)
    assert "is no whole ViT" in reason(torn, **TOLD)
    assert "does not tell model.heads" in reason(torn)
