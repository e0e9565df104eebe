"""Files of weights with foreign names: logits as timm's, and every fault named in one line."""

import argparse
import contextlib
import functools
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitdist import model, weights
from vitdist.config import Model

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
TOLD: dict[str, Any] = {"heads": 4, "layer_norm_eps": 1e-6, "activation": "gelu"}
CLASSES = list("abcde")


def disturbed(net: nn.Module) -> Any:
    """`net` in evaluation mode with no tensor left at zero or one, where a mistake would not show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def timm(**changes: Any) -> Any:
    return disturbed(VisionTransformer(**(SMALL | changes)))


def write(folder: Path, tensors: Any, name: str = "w.safetensors") -> str:
    if name.endswith(".safetensors"):
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / name)
    else:
        torch.save(tensors, folder / name)
    return str(folder / name)


def opened(path: str, size: int = 32, classes: list[str] | None = None, **changes: Any) -> tuple[Any, model.Weights]:
    """The file as the model that evaluates it: with its own head."""
    asked = Model(pretrained=path, image_size=size, **(TOLD | changes))
    return model.build(asked, classes or CLASSES, 0, exact_head=True)


def pictures(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def same(net: Any, reference: nn.Module, size: int = 32) -> None:
    with torch.no_grad():
        ours, theirs = net(pixel_values=pictures(size)).logits, reference(pictures(size))
    assert theirs.std() > 0.1, "the reference says nothing"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# ---- the same numbers as timm's ----------------------------------------------------------------

SHAPES = {"Ti": (192, 3, 12), "S": (384, 6, 12), "B": (768, 12, 12), "L": (1024, 16, 24)}


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize(("name", "depth"), [("Ti", 12), ("S", 2), ("B", 1), ("L", 1)])
def test_logits_are_timms(tmp_path: Path, name: str, depth: int, pool: str) -> None:
    compare(tmp_path, name, depth, pool)


@pytest.mark.full
@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_timms_at_full_depth(tmp_path: Path, name: str, pool: str) -> None:
    compare(tmp_path, name, SHAPES[name][2], pool)


def compare(folder: Path, name: str, depth: int, pool: str) -> None:
    width, heads, _ = SHAPES[name]
    shape = {"img_size": 64, "patch_size": 16, "embed_dim": width, "num_heads": heads, "depth": depth}
    torch.manual_seed(0)
    reference = VisionTransformer(**shape, num_classes=5, global_pool=pool)
    with torch.no_grad():  # as far from its start as keeps numbers near 1 in 24 blocks
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    reference.eval()
    net, told = opened(write(folder, reference.state_dict()), 64, heads=heads)
    assert told.missing == told.ignored == told.resized == []
    assert told.loaded == len(net.state_dict())
    same(net, reference, 64)


VARIANTS = {
    "no bias of qkv": {"qkv_bias": False},
    "no bias of qkv, mean": {"qkv_bias": False, "global_pool": "avg"},
    "LayerScale": {"init_values": 0.5},
    "LayerScale, mean": {"init_values": 0.5, "global_pool": "avg"},
    "DeiT III: no position of the class token": {"no_embed_class": True, "init_values": 0.5},
    "wide": {"mlp_ratio": 3.5},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_of_timms_vit(tmp_path: Path, changes: dict[str, Any]) -> None:
    reference = timm(**changes)
    net, _ = opened(write(tmp_path, reference.state_dict()))
    same(net, reference)


@pytest.mark.parametrize("size", [48, 24])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_another_resolution_is_timms_without_antialiasing(tmp_path: Path, pool: str, size: int) -> None:
    reference = timm(global_pool=pool)
    path = write(tmp_path, reference.state_dict())
    net, told = opened(path, size)
    side = size // 8
    assert told.resized == [f"position_embeddings 4x4 to {side}x{side}"]
    state = reference.state_dict()
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [side, side], antialias=False)
    larger = VisionTransformer(**(SMALL | {"img_size": size, "global_pool": pool})).eval()
    larger.load_state_dict(state)
    same(net, larger, size)


def test_a_distilled_deit_answers_with_the_mean_of_both_heads(tmp_path: Path) -> None:
    reference = disturbed(VisionTransformerDistilled(**SMALL))
    net, told = opened(write(tmp_path, {"model": reference.state_dict()}, "deit.pth"))
    assert type(net).__name__ == "DeiTForImageClassificationWithTeacher"
    assert not told.missing
    same(net, reference)
    for size, kept in ((32, True), (48, False)):
        asked = Model(pretrained=str(tmp_path / "deit.pth"), image_size=size, **TOLD)
        net, told = model.build(asked, ["x", "y"], 0)
        assert net(pixel_values=pictures(size)).logits.shape == (3, 2)
        assert bool(told.resized) is not kept


def test_beit_with_relative_biases(tmp_path: Path) -> None:
    for changes in ({"use_rel_pos_bias": True}, {"use_shared_rel_pos_bias": True}):
        reference = disturbed(Beit(**SMALL, init_values=0.5, use_abs_pos_emb=False, **changes))
        net, told = opened(write(tmp_path, reference.state_dict(), "beit.pth"))
        assert not told.missing
        same(net, reference)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [0, 3])
def test_dinov2s_own_names(tmp_path: Path, registers: int, swiglu: bool) -> None:
    """Features as timm computes them of the same file; DINOv2 has no head."""
    from timm.layers import GluMlp
    from timm.models.vision_transformer import checkpoint_filter_fn

    shape: dict[str, Any] = {"init_values": 0.5, "num_classes": 0, "reg_tokens": registers}
    if registers:
        shape["no_embed_class"] = True
    if swiglu:  # as DINOv2 ViT-g: 2 x 88 is two thirds of 4 x 32, rounded up to a multiple of 8
        shape |= {"mlp_layer": lambda *a, **k: GluMlp(*a, **(k | {"act_layer": nn.SiLU, "gate_last": False}))}
        shape["mlp_ratio"] = 2 * 88 / 32
    reference = timm(**shape)
    own = reference.state_dict()
    own["mask_token"] = torch.ones(1, 32)
    if registers:
        own["register_tokens"] = own.pop("reg_token")
        first = torch.randn(1, 1, 32)
        own["pos_embed"] = torch.cat([first, own["pos_embed"]], dim=1)
        own["cls_token"] = own["cls_token"] - first
    if swiglu:
        own = {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in own.items()}
    path = write(
        tmp_path,
        {"teacher": {f"backbone.{k}": v for k, v in own.items()} | {"dino_head.x": own["mask_token"]}},
        "d.pth",
    )
    told = TOLD | ({"activation": None} if swiglu else {})
    net, found = model.build(Model(pretrained=path, image_size=32, **told), CLASSES, 0)
    assert net.config.model_type == ("dinov2_with_registers" if registers else "dinov2")
    assert found.ignored == ["dino_head.x"]
    if swiglu:
        assert "which is taken for DINOv2's SwiGLU: leave model.activation out" in refusal(path)
    reference.load_state_dict(checkpoint_filter_fn(dict(own), reference))
    with torch.no_grad():
        tokens = reference.forward_features(pictures())
        expected = net.classifier(torch.cat([tokens[:, 0], tokens[:, 1 + registers :].mean(1)], dim=1))
        torch.testing.assert_close(net.eval()(pixel_values=pictures()).logits, expected, atol=1e-5, rtol=1e-5)


def test_registers_with_positions_keep_their_sums(tmp_path: Path) -> None:
    reference = timm(reg_tokens=2, num_classes=0, init_values=0.5)
    net, _ = model.build(Model(pretrained=write(tmp_path, reference.state_dict()), image_size=32, **TOLD), CLASSES, 0)
    with torch.no_grad():
        tokens = reference.forward_features(pictures())
        ours = net.eval().base_model(pixel_values=pictures()).last_hidden_state
    torch.testing.assert_close(ours, tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict", "module.", "teacher", "student namespace", "chunks"])
def test_what_is_wrapped_around_a_vit(tmp_path: Path, wrap: str) -> None:
    reference = timm()
    state = reference.state_dict()
    dino = {f"backbone.{k}": v for k, v in state.items() if not k.startswith("head")}
    around: dict[str, Any] = {
        "plain": state,
        "model": {"model": state, "epoch": 3},
        "state_dict": {"state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": {"state": {}}},
        "module.": {f"module.encoder.{k}": v for k, v in state.items()},
        "teacher": {"teacher": dino | {"head.mlp.0.weight": torch.ones(2, 2)}, "student": {}},
        "chunks": {k.replace("blocks.", "blocks.0."): v for k, v in state.items()},
        "student namespace": {"model": state, "args": argparse.Namespace(lr=1e-3)},
    }
    asked = Model(pretrained=write(tmp_path, around[wrap], "w.pth"), image_size=32, **TOLD)
    net, told = model.build(asked, CLASSES, 0)
    if wrap == "teacher":
        assert told.ignored == ["head.mlp.0.weight"]
        assert told.missing == ["classifier.bias", "classifier.weight"]
    with torch.no_grad():
        features = net.eval().base_model(pixel_values=pictures()).last_hidden_state
        torch.testing.assert_close(features, reference.forward_features(pictures()), atol=1e-5, rtol=1e-5)


def test_maes_decoder_stays_behind_and_its_norm_begins_anew_under_mean_pooling(tmp_path: Path) -> None:
    reference = timm(num_classes=0)
    state = reference.state_dict() | {"mask_token": torch.ones(1, 1, 16), "decoder_pos_embed": torch.ones(1, 17, 16)}
    state |= {f"decoder_blocks.{i}.norm1.weight": torch.ones(16) for i in range(3)}
    path = write(tmp_path, {"model": state}, "mae.pth")
    net, told = model.build(Model(pretrained=path, image_size=32, pool="mean", **TOLD), CLASSES, 0)
    assert told.missing == [
        "beit.pooler.layernorm.bias",
        "beit.pooler.layernorm.weight",
        "classifier.bias",
        "classifier.weight",
    ]
    assert {"decoder_pos_embed", "mask_token"} < set(told.ignored)
    assert len(told.ignored) == 7
    assert "left out: decoder_blocks.* (3)" in str(told)
    reference.norm = nn.Identity()
    with torch.no_grad():
        pooled = reference.forward_features(pictures())[:, 1:].mean(1)
        expected = net.classifier(nn.functional.layer_norm(pooled, (32,), eps=1e-6))
        torch.testing.assert_close(net.eval()(pixel_values=pictures()).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_norm_that_is_neither_there_nor_needed_is_not_told(tmp_path: Path) -> None:
    path = write(tmp_path, {k: v for k, v in timm().state_dict().items() if not k.startswith("norm.")})
    _, told = model.build(Model(pretrained=path, image_size=32, head="keep", **TOLD), CLASSES, 0)
    assert told.missing == ["vit.layernorm.bias", "vit.layernorm.weight"]
    _, told = model.build(Model(pretrained=path, image_size=32, head="keep", pool="mean", **TOLD), CLASSES, 0)
    assert told.missing == ["beit.pooler.layernorm.bias", "beit.pooler.layernorm.weight"]
    assert told.ignored == []


def test_half_precision_in_a_file_becomes_single(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in timm().state_dict().items()}
    net, _ = opened(write(tmp_path, state))
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_a_skeleton_of_a_file_reads_shapes_alone(tmp_path: Path) -> None:
    for name, state in (("w.safetensors", timm().state_dict()), ("w.pth", {"model": timm().state_dict()})):
        asked = Model(pretrained=write(tmp_path, state, name), image_size=48, pool="mean", **TOLD)
        bones = model.skeleton(asked, 7)
        net, _ = model.build(asked, list("1234567"), 0)
        assert all(p.is_meta for p in bones.parameters())
        shapes = {n: p.shape for n, p in bones.named_parameters()}
        assert shapes == {n: p.shape for n, p in net.named_parameters()}


# ---- faults ------------------------------------------------------------------------------------


def refusal(path: str, size: int = 32, **changes: Any) -> str:
    with pytest.raises(ValueError, match=r"^model\.") as caught:
        model.build(Model(pretrained=path, image_size=size, **(TOLD | changes)), CLASSES, 0)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400 + len(path)
    return text


def test_what_shapes_do_not_tell_is_asked_for_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, timm(embed_dim=384, num_heads=6).state_dict())
    text = refusal(path, heads=None, layer_norm_eps=None, activation=None)
    assert "model.heads: ViT-S 6" in text
    assert "model.layer_norm_eps: 1e-6" in text
    assert "model.activation: gelu" in text
    assert "model.heads" not in refusal(path, heads=6, layer_norm_eps=None)
    assert "model.heads 5 does not divide the width 384" in refusal(path, heads=5)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    state = timm().state_dict()
    path = write(tmp_path, {"model": state, "bomb": Bomb(tmp_path / "ran")}, "evil.pth")
    assert "asks for posix.mkdir" in refusal(path)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert "raw.pt" in refusal(str(tmp_path / "raw.pt"))
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the bomb is a dud"


def test_files_that_are_torn_missing_or_of_something_else(tmp_path: Path) -> None:
    whole = {name: write(tmp_path, timm().state_dict(), name) for name in ("w.safetensors", "w.pth")}
    for name, path in whole.items():
        torn = tmp_path / f"torn.{name}"
        torn.write_bytes(Path(path).read_bytes()[:3000])
        assert "torn, or no file of weights" in refusal(str(torn))
    (tmp_path / "empty.pth").write_bytes(b"")
    assert "torn, or no file of weights" in refusal(str(tmp_path / "empty.pth"))
    assert "no such file" in refusal(str(tmp_path / "none.safetensors"))
    assert "no such file" in refusal(str(tmp_path / "none.pth"))
    other = write(tmp_path, {"layer1.0.conv1.weight": torch.ones(2), "fc.weight": torch.ones(2)}, "resnet.pth")
    assert "names begin with layer1, fc" in refusal(other)
    assert "holds no tensors by name" in refusal(write(tmp_path, {"epoch": 3}, "numbers.pth"))


def test_names_of_transformers_ask_for_the_folder(tmp_path: Path) -> None:
    net, _ = opened(write(tmp_path, timm().state_dict()))
    net.save_pretrained(tmp_path / "hf")
    assert f"give model.pretrained={tmp_path / 'hf'}" in refusal(str(tmp_path / "hf" / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("blocks.1.mlp.fc1.weight", lambda t: t[:, :16], "vit.layers.1.mlp.fc1.weight would be [128, 16]"),
        ("blocks.1.norm2.bias", lambda t: None, "has no tensor for vit.layers.1.layernorm_after.bias"),
        ("blocks.0.attn.qkv.weight", lambda t: t * float("nan"), "NaN or infinite values in blocks.0.attn.qkv.weight"),
        ("pos_embed", lambda t: t[:, :-2], "pos_embed has 15 positions"),
        ("patch_embed.proj.weight", lambda t: t[:, :1], "takes 1 channels, not 3"),
        ("patch_embed.proj.weight", lambda t: t.flatten(1), "patch_embed.proj.weight is [32, 192], which is no ViT's"),
        ("cls_token", lambda t: None, "needs cls_token, which is not in the file"),
        ("blocks.0.mlp.fc1.weight", lambda t: None, "needs blocks.0.mlp.fc1.weight, which is not in the file"),
    ],
)
def test_one_tensor_at_fault_is_named(tmp_path: Path, name: str, change: Any, told: str) -> None:
    state = timm().state_dict()
    changed = change(state.pop(name))
    path = write(tmp_path, state if changed is None else state | {name: changed})
    assert told in refusal(path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"qk_norm": True}, "blocks.0.attn.k_norm"),
        ({"pre_norm": True}, "norm_pre"),
        ({"class_token": False, "global_pool": "avg"}, "cls_token"),
        ({"reg_tokens": 4}, "with registers"),
        ({"global_pool": "map"}, "attn_pool"),
    ],
)
def test_networks_that_transformers_cannot_express_are_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    assert told in refusal(write(tmp_path, timm(**changes).state_dict()))


def test_a_block_that_is_not_there_is_named(tmp_path: Path) -> None:
    state = {name: t for name, t in timm(depth=3).state_dict().items() if not name.startswith("blocks.1.")}
    assert "has block 2, but no block 1" in refusal(write(tmp_path, state))


def test_a_folder_with_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    net, _ = opened(write(tmp_path, timm().state_dict()))
    net.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(net.state_dict() | {"bomb": Bomb(tmp_path / "ran")}, tmp_path / "hf" / "pytorch_model.bin")
    assert "asks for posix.mkdir" in refusal(str(tmp_path / "hf"), heads=None, layer_norm_eps=None, activation=None)
    assert not (tmp_path / "ran").exists()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_damage_gives_another_error_than_a_refusal(data: st.DataObject) -> None:
    """A byte changed in the header, or the file cut: it is refused, or what it says is still a ViT."""
    name, raw = data.draw(st.sampled_from(sorted(_whole().items())))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    else:
        place = data.draw(st.integers(0, 4000))
        raw = raw[:place] + bytes([data.draw(st.integers(0, 255))]) + raw[place + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(raw)
        with contextlib.suppress(ValueError):
            held = weights.convert(weights.read(path), Model(pretrained=str(path), image_size=32, **TOLD))
            assert held.family == "vit"


@functools.cache
def _whole() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        paths = {n: write(Path(folder), timm(depth=1).state_dict(), n) for n in ("w.safetensors", "w.pth")}
        return {name: Path(path).read_bytes() for name, path in paths.items()}


def test_a_second_token_that_no_class_has_is_not_dropped(tmp_path: Path) -> None:
    scaled = disturbed(VisionTransformerDistilled(**SMALL, init_values=0.5))
    assert "has a place for dist_token (1 such tensors)" in refusal(write(tmp_path, scaled.state_dict(), "d.pth"))


def test_a_head_of_another_size_with_keep(tmp_path: Path) -> None:
    path = write(tmp_path, timm(num_classes=7).state_dict())
    assert "has a head of 7 classes, where one of 5 is needed" in refusal(path, head="keep")
    bare = write(tmp_path, timm(num_classes=0).state_dict())
    assert "has no head, where one of 5 is needed" in refusal(bare, head="keep")
    with pytest.raises(ValueError, match="does not name its classes"):
        model.build(Model(pretrained=path, image_size=32, **TOLD), None, 0)


def test_many_names_are_told_by_their_beginnings() -> None:
    assert weights.short(["a", "b.c"]) == "a, b.c"
    assert weights.short([f"decoder.{i}" for i in range(5)] + ["mask"]) == "decoder.* (5), mask"
    assert weights.short([f"a.b.{i}" for i in range(3)] + ["a.c.1", "a.c.2"]) == "a.b.* (3), a.c.* (2)"
    assert weights.short([f"{c}.x" for c in "abcdefgh"]).endswith(" and 2 more")
