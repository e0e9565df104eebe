"""Every family of ViT: loaded, resized, pooled, frozen, adapted, trained, exported; what does not fit is named."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from tests.ranks import matrix
from vitdist import model
from vitdist.config import Lora, Model, Scratch
from vitdist.optim import groups as optimizer_groups

SHAPE = Scratch(patch_size=8, width=32, depth=2, heads=2)
CLASSES = ["ant", "bee", "cat"]
COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "id2label": dict(enumerate(CLASSES)),
    "label2id": {name: i for i, name in enumerate(CLASSES)},
}
MLP = {"intermediate_size": 64}
BEIT = MLP | {"layer_scale_init_value": 0.5, "drop_path_rate": 0.1}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViT", "ForImageClassification", MLP),
    "msn": ("ViTMSN", "ForImageClassification", MLP),
    "deit": ("DeiT", "ForImageClassification", MLP),
    "deit distilled": ("DeiT", "ForImageClassificationWithTeacher", MLP),
    "beit": ("Beit", "ForImageClassification", BEIT | {"use_relative_position_bias": True}),
    "beit shared": ("Beit", "ForImageClassification", BEIT | {"use_shared_relative_position_bias": True}),
    "beit absolute": ("Beit", "ForImageClassification", BEIT | {"use_absolute_position_embeddings": True}),
    "dinov2": ("Dinov2", "ForImageClassification", {"mlp_ratio": 2, "drop_path_rate": 0.1}),
    "dinov2 swiglu": ("Dinov2", "ForImageClassification", {"mlp_ratio": 4, "use_swiglu_ffn": True}),
    "dinov2 registers": ("Dinov2WithRegisters", "ForImageClassification", {"num_register_tokens": 3, "mlp_ratio": 2}),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def disturbed(net: Any) -> Any:
    """`net` with no tensor left at zero or one, where a mistake would not show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval()


def stock(family: str, **changes: Any) -> Any:
    prefix, kind, own = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**(COMMON | own | changes))
    return disturbed(getattr(transformers, f"{prefix}{kind}")(config))


def saved(net: Any, folder: Path) -> str:
    net.save_pretrained(folder)
    return str(folder)


def pictures(size: int = 32) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


def answer(net: Any, size: int = 32, **more: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = net.eval()(pixel_values=pictures(size), **more).logits
    return logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def train_a_step(net: Any, size: int = 32) -> tuple[float, float]:
    """Losses before and after one step of everything that is trained."""
    labels = torch.arange(4) % net.config.num_labels
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(net.train()(pixel_values=pictures(size)).logits, labels)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[1]


# ---- families ----------------------------------------------------------------------------------


@every_family
def test_a_family_is_loaded_numbered_trained_and_written(tmp_path: Path, family: str) -> None:
    original = stock(family)
    settings = Model(pretrained=saved(original, tmp_path / "m"), image_size=32, gradient_checkpointing=True)
    net, told = model.build(settings, CLASSES, 0)
    assert told.missing == told.ignored == told.resized == []
    assert told.classes == CLASSES
    assert told.loaded == len(original.state_dict())
    assert net.config._attn_implementation == "sdpa"
    close(answer(net), answer(original))
    assert _attention_calls(net) == 2
    assert _attention_calls(net, train=True) == 4, "computed again in the backward pass"

    numbers, depth = model.layers(net)
    assert depth == 2
    assert set(numbers.values()) == {0, 1, 2, 3}
    assert len(optimizer_groups(net, numbers, depth, _optim(), model.layer_name)) >= 7
    assert {n for n, p in net.named_parameters() if not p.requires_grad} <= {
        f"{net.base_model_prefix}.embeddings.mask_token"
    }
    before, after = train_a_step(net)
    assert after < before
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in net.parameters() if not p.requires_grad)

    whole = model.finished(net, {name: p.detach().clone() for name, p in net.named_parameters()})
    again = AutoModelForImageClassification.from_pretrained(saved(whole, tmp_path / "out"))
    assert type(again) is type(original)
    close(answer(again), answer(net))
    assert not torch.allclose(answer(again), answer(original), atol=1e-4), "the step must be in it"
    assert getattr(again.config, "drop_path_rate", 0.0) == 0.0


def _attention_calls(net: Any, train: bool = False) -> int:
    """How often torch's fused attention is called: in an evaluation, or in a forward and backward pass of training."""
    with mock.patch.object(
        nn.functional, "scaled_dot_product_attention", wraps=nn.functional.scaled_dot_product_attention
    ) as attention:
        if train:
            net.train()(pixel_values=pictures()).logits.sum().backward()
            net.zero_grad()
        else:
            answer(net)
    return attention.call_count


def _optim() -> Any:
    from vitdist.config import Optim

    return Optim()


@pytest.mark.parametrize(
    ("family", "size"), matrix({(f, 48) for f in FAMILIES} | {("vit", 24), ("beit", 24)}, FAMILIES, [48, 24])
)
def test_another_size_is_what_transformers_computes_at_that_size(tmp_path: Path, family: str, size: int) -> None:
    original = stock(family)
    net, told = model.build(Model(pretrained=saved(original, tmp_path / "m"), image_size=size), CLASSES, 0)
    assert told.resized
    more = {"interpolate_pos_encoding": True} if family in ("vit", "msn", "deit", "deit distilled") else {}
    close(answer(net, size), answer(original, size, **more))
    assert net.config.image_size == size
    whole = model.finished(net, dict(net.state_dict()))
    again = AutoModelForImageClassification.from_pretrained(saved(whole, tmp_path / "out"))
    close(answer(again, size), answer(net, size))


@every_family
def test_a_skeleton_has_the_names_and_shapes_of_the_model(tmp_path: Path, family: str) -> None:
    for more in ({"freeze": 2}, {"lora": Lora(targets="all-linear")}):
        settings = Model(pretrained=saved(stock(family), tmp_path / "m"), image_size=48, **more)
        bones, (net, _) = model.skeleton(settings, 5), model.build(settings, list("vwxyz"), 0)
        assert all(p.is_meta for p in bones.parameters())
        described = [[(n, p.shape, p.requires_grad) for n, p in m.named_parameters()] for m in (bones, net)]
        assert described[0] == described[1]
        assert model.layers(bones) == model.layers(net)
        assert model.flops_per_image(bones) == model.flops_per_image(net)


def test_an_encoder_of_mae_becomes_a_vit(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(
        **(COMMON | MLP),
        decoder_hidden_size=16,
        decoder_num_hidden_layers=3,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        mask_ratio=0.0,
    )
    mae = disturbed(transformers.ViTMAEForPreTraining(config))
    folder = saved(mae, tmp_path / "mae")
    net, told = model.build(Model(pretrained=folder, image_size=32), ["x", "y"], 0)
    assert told.missing == ["classifier.bias", "classifier.weight"]
    assert all(name.startswith("decoder.") for name in told.ignored)
    assert len(told.ignored) == len(mae.decoder.state_dict())
    assert f"decoder.decoder_layers.* ({16 * 3})" in str(told)
    with torch.no_grad():  # without masking MAE still shuffles its patches: put them back in order
        hidden = mae.vit(pictures(), noise=torch.arange(16).expand(4, 16)).last_hidden_state
        close(net.eval().base_model(pixel_values=pictures()).last_hidden_state, hidden)
    pooled, told = model.build(Model(pretrained=folder, image_size=32, pool="mean"), ["x", "y"], 0)
    assert type(pooled).__name__ == "BeitForImageClassification"
    assert {"vit.layernorm.bias", "vit.layernorm.weight"} < set(told.ignored)
    assert {"beit.pooler.layernorm.bias", "beit.pooler.layernorm.weight"} < set(told.missing)


# ---- pooling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "msn"])
def test_mean_pooling_is_norm_of_the_mean_of_patches(tmp_path: Path, family: str) -> None:
    original = stock(family)
    settings = Model(pretrained=saved(original, tmp_path / "m"), image_size=48, pool="mean")
    net, told = model.build(settings, CLASSES, 0)
    assert told.missing == ["beit.pooler.layernorm.bias", "beit.pooler.layernorm.weight"]
    assert told.ignored == ["vit.layernorm.bias", "vit.layernorm.weight"]
    cls, _ = model.build(Model(pretrained=str(tmp_path / "m"), image_size=48), CLASSES, 0)
    cls.base_model.layernorm = nn.Identity()
    with torch.no_grad():
        patches = cls.eval().base_model(pixel_values=pictures(48)).last_hidden_state[:, 1:]
        expected = original.classifier(
            nn.functional.layer_norm(patches.mean(1), (32,), eps=original.config.layer_norm_eps)
        )
    close(answer(net, 48), expected)
    before, after = train_a_step(net, 48)
    assert after < before
    assert net.config._attn_implementation == "sdpa"
    again = AutoModelForImageClassification.from_pretrained(
        saved(model.finished(net, net.state_dict()), tmp_path / "o")
    )
    close(answer(again, 48), answer(net, 48))
    reopened, told = model.build(Model(pretrained=str(tmp_path / "o"), image_size=48), None, 0, exact_head=True)
    assert told.missing == told.ignored == []
    close(answer(reopened, 48), answer(net, 48))


def test_beit_on_its_class_token_and_back(tmp_path: Path) -> None:
    folder = saved(stock("beit"), tmp_path / "m")
    net, told = model.build(Model(pretrained=folder, image_size=32, pool="cls"), CLASSES, 0)
    assert not net.config.use_mean_pooling
    assert told.missing == ["beit.layernorm.bias", "beit.layernorm.weight"]
    assert told.ignored == ["beit.pooler.layernorm.bias", "beit.pooler.layernorm.weight"]
    same, told = model.build(Model(pretrained=folder, image_size=32, pool="mean"), CLASSES, 0)
    assert not told.missing
    close(answer(same), answer(stock("beit")))


@pytest.mark.parametrize("family", ["deit", "dinov2", "dinov2 registers"])
def test_pooling_that_a_class_does_not_have_is_refused(tmp_path: Path, family: str) -> None:
    with pytest.raises(ValueError, match=r"model.pool=mean: transformers' \w+ pools its own way"):
        model.build(Model(pretrained=saved(stock(family), tmp_path / "m"), image_size=32, pool="mean"), CLASSES, 0)


# ---- scratch and seeds -------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights() -> None:
    one, two, other = (model.build(Model(scratch=SHAPE, image_size=32), ["a", "b"], seed=s)[0] for s in (0, 0, 1))
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_scratch_pools_as_asked() -> None:
    net, told = model.build(Model(scratch=SHAPE, image_size=32, pool="mean"), CLASSES, 0)
    cls, _ = model.build(Model(scratch=SHAPE, image_size=32), CLASSES, 0)
    assert str(told) == "random weights"
    assert told.mean == told.std == (0.5, 0.5, 0.5)
    assert torch.equal(net.beit.embeddings.position_embeddings, cls.vit.embeddings.position_embeddings)
    assert net.config.num_labels == 3
    before, after = train_a_step(net)
    assert after < before


def test_new_weights_of_a_checkpoint_follow_the_seed_alone(tmp_path: Path) -> None:
    settings = Model(pretrained=saved(stock("vit"), tmp_path / "m"), image_size=32, lora=Lora(rank=4))
    built = []
    for seed in (0, 0, 1):
        torch.rand(seed + len(built))  # the generator is not where it was
        net, _ = model.build(settings, ["x", "y"], seed)
        built.append({n: p.detach() for n, p in net.named_parameters() if "lora_A" in n or "classifier.weight" in n})
    assert len(built[0]) == 5
    assert all(torch.equal(built[0][n], built[1][n]) for n in built[0])
    assert not any(torch.equal(built[0][n], built[2][n]) for n in built[0])


# ---- heads -------------------------------------------------------------------------------------


def test_a_head_is_kept_for_the_same_classes_in_any_order(tmp_path: Path) -> None:
    original = stock("vit")
    folder = saved(original, tmp_path / "m")
    turned = [CLASSES[2], CLASSES[0], CLASSES[1]]
    net, told = model.build(Model(pretrained=folder, image_size=32), turned, 0)
    assert not told.missing
    close(answer(net), answer(original)[:, [2, 0, 1]])
    assert net.config.id2label == dict(enumerate(turned))
    net, told = model.build(Model(pretrained=folder, image_size=32, head="new"), CLASSES, 0)
    assert told.missing == told.ignored == ["classifier.bias", "classifier.weight"]
    assert not torch.allclose(answer(net), answer(original), atol=0.01)
    net, told = model.build(Model(pretrained=folder, image_size=32, head="keep"), ["x", "y", "z"], 0)
    assert not told.missing
    close(answer(net), answer(original))
    assert net.config.id2label == dict(enumerate("xyz"))


def test_a_new_head_for_other_classes_and_the_rest_loaded(tmp_path: Path) -> None:
    original = stock("vit")
    settings = Model(pretrained=saved(original, tmp_path / "m"), image_size=32)
    net, told = model.build(settings, ["x", "y"], seed=0)
    assert told.missing == ["classifier.bias", "classifier.weight"]
    assert net.classifier.out_features == net.num_labels == 2
    assert net.config.id2label == {0: "x", 1: "y"}
    assert net.training
    for name, parameter in net.named_parameters():
        if not name.startswith("classifier"):
            assert torch.equal(parameter, original.get_parameter(name)), name
    whole = model.finished(net, net.state_dict())
    again = AutoModelForImageClassification.from_pretrained(saved(whole, tmp_path / "o"))
    close(answer(again), answer(net))
    assert again.config.label2id == {"x": 0, "y": 1}


def test_a_finished_model_needs_its_own_head(tmp_path: Path) -> None:
    folder = saved(stock("vit"), tmp_path / "m")
    net, _ = model.build(Model(pretrained=folder, image_size=32, head="new"), None, 0, exact_head=True)
    assert not net.training
    assert net.config.id2label == dict(enumerate(CLASSES))
    close(answer(net), answer(stock("vit")))
    with pytest.raises(ValueError, match="has a head of 3 classes, where one of 2 is needed"):
        model.build(Model(pretrained=folder, image_size=32), ["x", "y"], 0, exact_head=True)
    bare = transformers.ViTModel(transformers.ViTConfig(**(COMMON | MLP)))
    with pytest.raises(ValueError, match="has no head, where one of 2 is needed"):
        model.build(Model(pretrained=saved(bare, tmp_path / "bare"), image_size=32), ["x", "y"], 0, exact_head=True)
    with pytest.raises(ValueError, match="does not name its classes"):
        model.build(Model(pretrained=str(tmp_path / "bare"), image_size=32), None, 0)
    unnamed = {"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    with pytest.raises(ValueError, match="does not name its classes"):
        model.build(Model(pretrained=saved(stock("vit", **unnamed), tmp_path / "u"), image_size=32), None, 0)


# ---- what is trained ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "beit shared", "dinov2"])
def test_freezing_from_below(tmp_path: Path, family: str) -> None:
    folder = saved(stock(family), tmp_path / "m")
    for frozen in (0, 1, 2, 3):
        net, _ = model.build(Model(pretrained=folder, image_size=32, freeze=frozen), ["x", "y"], 0)
        numbers, _ = model.layers(net)
        for name, parameter in net.named_parameters():
            assert parameter.requires_grad == (numbers[name] >= frozen and "mask_token" not in name), (frozen, name)
    net, _ = model.build(Model(pretrained=folder, image_size=32, freeze="all"), ["x", "y"], 0)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]
    with pytest.raises(ValueError, match=r"model\.freeze 4: there are 2 blocks: at most 3"):
        model.build(Model(pretrained=folder, image_size=32, freeze=4), ["x", "y"], 0)


@pytest.mark.parametrize(
    ("family", "targets"),
    matrix(
        {
            ("vit", "query-value"),
            ("deit distilled", "attention"),
            ("beit", "all-linear"),
            ("dinov2 swiglu", "all-linear"),
        },
        FAMILIES,
        ["query-value", "attention", "all-linear"],
    ),
)
def test_adapters_learn_and_are_merged(tmp_path: Path, family: str, targets: Any) -> None:
    original = stock(family)
    settings = Model(
        pretrained=saved(original, tmp_path / "m"),
        image_size=32,
        lora=Lora(rank=4, alpha=8, targets=targets),
        gradient_checkpointing=True,
        drop_path=0.2,
    )
    net, told = model.build(settings, CLASSES, 0)
    assert type(net) is type(original)
    assert told.loaded == len(original.state_dict())
    close(answer(net), answer(original))
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "classifier." in n for n in trained)
    mlp = 3 if family == "dinov2 swiglu" else 2
    adapters = {"query-value": 2, "attention": 4, "all-linear": 4 + mlp}[targets]
    assert sum("lora_A" in n for n in trained) == 2 * adapters
    numbers, _ = model.layers(net)
    assert {numbers[n] for n in trained} == {1, 2, 3}
    paths = model.drop_paths(net)
    assert paths
    paths.draw(0, 0, (0, 4), 4)
    before, after = train_a_step(net)
    assert after < before
    whole = model.finished(net, net.state_dict())
    assert not any("lora" in n or "base_layer" in n for n, _ in whole.named_parameters())
    again = AutoModelForImageClassification.from_pretrained(saved(whole, tmp_path / "o"))
    close(answer(again), answer(net))
    assert not torch.allclose(answer(again), answer(original), atol=1e-4)


# ---- pixels and the report ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (None, (None, None)),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),
        ({"do_normalize": False, "image_mean": [0.1, 0.2, 0.3]}, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))),
        ({"size": 224}, (None, None)),
    ],
)
def test_pixels_are_asked_of_the_folder(tmp_path: Path, told: Any, expected: Any) -> None:
    folder = saved(stock("vit"), tmp_path / "m")
    if told is not None:
        (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(told))
    _, found = model.build(Model(pretrained=folder, image_size=32), CLASSES, 0)
    assert (found.mean, found.std) == expected


def test_the_report_is_one_line(tmp_path: Path) -> None:
    folder = saved(stock("vit"), tmp_path / "m")
    _, told = model.build(Model(pretrained=folder, image_size=48, pool="mean"), ["x", "y"], 0)
    assert str(told) == (
        f"weights of {folder}: 34 tensors loaded; new: beit.pooler.layernorm.bias, beit.pooler.layernorm.weight, "
        "classifier.bias, classifier.weight; left out: classifier.bias, classifier.weight, vit.layernorm.bias, "
        "vit.layernorm.weight; resized: position_embeddings 4x4 to 6x6"
    )


# ---- faults ------------------------------------------------------------------------------------


def _edit(change: dict[str, Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return edit


def _tear(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def _spoil(value: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        tensors["vit.encoder.layer.1.intermediate.dense.weight"][3, 4] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            _edit({"num_hidden_layers": 3}),
            r"has no vit\.layers\.2\.\S+; its config.json is of another model \(3 blocks\)",
        ),
        (_edit({"num_hidden_layers": 1}), r"has a tensor without a place, vit\.layers\.1\.\S+; .* \(1 blocks\)"),
        (_edit({"hidden_size": 48}), r"is \[3, 32\], but by its config.json it must be \[3, 48\]"),
        (_edit({"intermediate_size": 48}), r"vit\.layers\.0\.mlp\.fc1\.bias is \[64\].*must be \[48\]"),
        (_edit({"patch_size": 4}), r"is \[1, 17, 32\]|is \[32, 3, 8, 8\]"),
        (_edit({"model_type": "resnet"}), "is a model of type 'resnet', not one of: vit, vit_mae"),
        (_edit({"model_type": "vti"}), "cannot be loaded"),
        (_edit({"image_size": [32, 64]}), "is not for square pictures"),
        (_tear, "torn, or no file of weights"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (_spoil(float("nan")), r"NaN or infinite values in vit\.layers\.1\.mlp\.fc1\.weight"),
        (_spoil(float("-inf")), r"NaN or infinite values in vit\.layers\.1\.mlp\.fc1\.weight"),
    ],
)
def test_a_folder_at_fault_is_named(tmp_path: Path, spoil: Any, told: str) -> None:
    folder = saved(stock("vit"), tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(ValueError, match=told) as caught:
        model.build(Model(pretrained=folder, image_size=32), CLASSES, 0)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model.pretrained")


def test_a_size_that_patches_do_not_fill(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.image_size 36 is not a multiple of the checkpoint's patch size 8"):
        model.build(Model(pretrained=saved(stock("vit"), tmp_path / "m"), image_size=36), CLASSES, 0)


def test_a_model_that_cannot_be_had_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.pretrained '.*nowhere' cannot be loaded.*hf download"):
        model.build(Model(pretrained=str(tmp_path / "nowhere"), image_size=32), ["a", "b"], seed=0)


# ---- arithmetic --------------------------------------------------------------------------------


def test_flops_of_vit_large() -> None:
    large = Model(scratch=Scratch(width=1024, depth=24, heads=16), image_size=224)
    assert model.flops_per_image(model.skeleton(large, 1000)) == pytest.approx(369.3e9, rel=1e-4)
    assert sum(p.numel() for p in model.skeleton(large, 10).parameters()) == 303_311_882


@every_family
def test_flops_are_what_torch_counts(tmp_path: Path, family: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    folder = saved(stock(family), tmp_path / "m")
    more: dict[str, Any]
    for more, forwards in (({}, 3), ({"freeze": "all"}, 1)):
        net, _ = model.build(Model(pretrained=folder, image_size=32, **more), CLASSES, 0)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            net.eval()(pixel_values=pictures()[:1])
        counted = counter.get_total_flops()
        assert counted * forwards == pytest.approx(model.flops_per_image(net), rel=0.01)


def test_dropout_is_known(tmp_path: Path) -> None:
    """Of units, of attention, in adapters: each makes losses depend on the number of ranks, which a run says."""
    plain = saved(stock("vit"), tmp_path / "plain")
    units = saved(stock("vit", hidden_dropout_prob=0.1), tmp_path / "units")
    attention = saved(stock("vit", attention_probs_dropout_prob=0.1), tmp_path / "attention")
    adapters = Lora(rank=4, dropout=0.1)
    for source, lora, expected in (
        (plain, None, False),
        (plain, Lora(rank=4), False),
        (plain, adapters, True),
        (units, None, True),
        (attention, None, True),
    ):
        net, _ = model.build(Model(pretrained=source, image_size=32, lora=lora), CLASSES, seed=0)
        assert model.dropout(net) == expected


QUICK = """
import sys
from pathlib import Path
from vitdist import model
model.import_quickly()
assert not {"scipy.optimize", "accelerate", "torchvision", "torch._dynamo", "sympy"} & set(sys.modules)
assert not [name for name, module in sys.modules.items() if isinstance(module, model._StandIn)]
from vitdist.config import Model, Scratch
import torch
net, _ = model.build(Model(image_size=16, scratch=Scratch(patch_size=8, width=32, depth=2, heads=2)), ["a", "b"], 0)
images = torch.randn(2, 3, 16, 16)
net.eval()
net.save_pretrained(sys.argv[1])
again, _ = model.build(Model(pretrained=sys.argv[1], image_size=16), ["a", "b"], 0)
again.eval()
assert torch.equal(net(pixel_values=images).logits, again(pixel_values=images).logits)
from vitdist import config, export, optim
optim.without_compiler()
for name in ("adamw", "sgd"):
    some = torch.nn.Parameter(torch.ones(3))
    group = {"params": [some], "lr": 0.1, "weight_decay": 0.0, "name": "a", "names": ["a"]}
    stepper = optim.optimizer([group], config.Optim(name=name, lr=0.1), torch.device("cpu"))
    some.sum().backward()
    stepper.step()
    stepper.zero_grad()
    assert some.grad is None and (some < 1).all(), name
    assert stepper.state_dict()["param_groups"][0]["lr"] == 0.1
assert "torch._dynamo" not in sys.modules
pixels = config.Pixels(image_size=16, eval_crop=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
assert export._processor(pixels).to_dict()["image_processor_type"] == "CLIPImageProcessor"
import peft  # what adapters need comes after it, whole
lora, _ = model.build(Model(pretrained=sys.argv[1], image_size=16, lora={"rank": 2}), ["a", "b"], 0)
assert lora(pixel_values=images).logits.shape == (2, 2)
"""


@pytest.mark.processes
def test_a_trainer_imports_only_what_it_needs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", QUICK, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
