"""What is exported: the folder against transformers, ONNX against torch, the card as a golden text."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests import ranks
from vitdist import cli, config, decision, export, model, rundir
from vitdist.config import Config, Pixels
from vitdist.data import storage
from vitdist.rundir import RunDir

GOLDEN = Path(__file__).parents[1] / "golden" / "card.md"
PIXELS = Pixels(image_size=16, eval_crop=0.8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
CLASSES = ["mole", "melanoma", "a|b"]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    shape = config.Scratch(patch_size=8, width=32, depth=2, heads=2)
    built, _ = model.build(config.Model(image_size=16, scratch=shape), CLASSES, 0)
    with torch.no_grad():
        built.classifier.weight.normal_()
    return model.finished(built, built.state_dict())


# ---- the folder --------------------------------------------------------------------------------


def test_the_folder_opens_with_transformers_alone(tmp_path: Path, net: Any) -> None:
    from transformers import AutoModelForImageClassification

    rule = decision.of(config.Unsure(cost=0.2), CLASSES)
    export.write(tmp_path / "model", net, PIXELS, "# card\n", rule)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(again(pixel_values=images).logits, net(pixel_values=images).logits)
    assert again.config.id2label == dict(enumerate(CLASSES))
    assert (tmp_path / "model" / "README.md").read_text() == "# card\n"
    assert decision.Decision.load(tmp_path / "model") == rule
    assert config.parse(Pixels, export.read_pixels(str(tmp_path / "model"))[0], "test") == PIXELS
    assert export.class_names(str(tmp_path / "model")) == CLASSES
    # written again, it holds nothing of the old one
    export.write(tmp_path / "model", net, PIXELS, None)
    assert not (tmp_path / "model" / "README.md").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@given(st.integers(8, 600), st.floats(0.05, 1))
def test_pixels_come_back_as_they_were(size: int, crop: float) -> None:
    """The share itself may be another one, but not the box that it cuts."""
    short = round(size / crop)
    said = {"size": {"shortest_edge": short}, "crop_size": {"height": size, "width": size}, "do_center_crop": True}
    found, note = export._geometry(said, "test")
    assert found["image_size"] == size
    assert round(size / found["eval_crop"]) == short
    assert 0 < found["eval_crop"] <= 1
    assert note is None


@pytest.mark.parametrize(
    ("said", "expected", "noted"),
    [
        ({"size": {"height": 224, "width": 224}}, {"image_size": 224, "eval_crop": 1.0}, True),  # ViTImageProcessor
        ({"size": {"shortest_edge": 224}}, {"image_size": 224, "eval_crop": 1.0}, False),
        ({"size": 256, "crop_size": 224, "do_center_crop": True}, {"image_size": 224, "eval_crop": 0.875}, False),
        ({"size": {"height": 384, "width": 384}, "do_resize": False}, {}, False),
        (
            {"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_resize": False},
            {"image_size": 224, "eval_crop": 1.0},
            False,
        ),
        (  # a crop that is turned off
            {"size": {"height": 224, "width": 224}, "crop_size": {"height": 96, "width": 96}, "do_center_crop": False},
            {"image_size": 224, "eval_crop": 1.0},
            True,
        ),
    ],
)
def test_processors_of_others(tmp_path: Path, said: dict[str, Any], expected: dict[str, Any], noted: bool) -> None:
    record = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(record | said))
    found, note = export.read_pixels(str(tmp_path))
    assert found == expected | {"mean": [0.5] * 3, "std": [0.25] * 3}
    assert (note is not None) == noted


def test_what_processors_cannot_say_or_we_cannot_do(tmp_path: Path) -> None:
    place = tmp_path / "preprocessor_config.json"
    square = {"size": {"height": 8, "width": 8}}
    place.write_text(json.dumps(square | {"do_normalize": False}))
    assert export.read_pixels(str(tmp_path))[0] | {} == {
        "image_size": 8,
        "eval_crop": 1.0,
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
    }
    place.write_text(json.dumps(square))
    assert "mean" not in export.read_pixels(str(tmp_path))[0]
    for said, reason in (
        ({"size": {"height": 8, "width": 16}}, "not square"),
        ({"rescale_factor": 1.0, **square}, r"does not scale pixels to 0\.\.1"),
        ({"do_rescale": False, **square}, r"does not scale pixels to 0\.\.1"),
        ({"size": {"shortest_edge": 8}, "crop_size": {"height": 9, "width": 9}, "do_center_crop": True}, "pads"),
    ):
        place.write_text(json.dumps(said))
        with pytest.raises(ValueError, match=reason):
            export.read_pixels(str(tmp_path))
    place.unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": 96}))
    assert export.read_pixels(str(tmp_path)) == ({"image_size": 96}, None)


def test_a_place_that_holds_something_else_is_refused(tmp_path: Path, net: Any) -> None:
    export.write(tmp_path / "model", net, PIXELS, None)
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "1.jpg").write_text("precious")
    for place in (precious, precious / "1.jpg"):
        with pytest.raises(ValueError, match="is no model folder"):
            export.copy(tmp_path / "model", place)
    assert (precious / "1.jpg").read_text() == "precious"
    export.copy(tmp_path / "model", tmp_path / "new" / "copy")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {path.name for path in (tmp_path / "new" / "copy").iterdir()} == names
    export.copy(tmp_path / "model", tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == names


# ---- ONNX --------------------------------------------------------------------------------------


def of_family(family: str) -> Any:
    import transformers

    more: dict[str, Any] = {"intermediate_size": 64}
    if family == "Beit":
        more |= {"use_mean_pooling": True, "use_relative_position_bias": True}
    if family.startswith("Dinov2"):
        more = {"mlp_ratio": 2}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    settings = getattr(transformers, f"{family}Config")(**shape, **more, num_labels=3)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForImageClassification")(settings)


@pytest.mark.parametrize(
    ("family", "raw"),
    ranks.matrix(
        {("ViT", False), ("Beit", True)},
        ("ViT", "DeiT", "Beit", "ViTMSN", "Dinov2", "Dinov2WithRegisters"),
        (False, True),
    ),
)
def test_onnx_answers_as_torch_does(tmp_path: Path, family: str, raw: bool) -> None:
    import onnx
    import onnxruntime

    net = of_family(family).eval()
    with torch.no_grad():
        net.classifier.weight.normal_()
    path = tmp_path / "deep" / "model.onnx"
    difference, opset = export.onnx(path, net, PIXELS, CLASSES, raw)
    assert difference <= 1e-4
    onnx.checker.check_model(onnx.load(path))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(3).integers(0, 256, (7, 3, 16, 16), dtype=np.uint8)
    normalised = (pixels / 255 - np.reshape(PIXELS.mean, (3, 1, 1))) / np.reshape(PIXELS.std, (3, 1, 1))
    assert net.config._attn_implementation == "sdpa"  # as it was
    with torch.no_grad():
        expected = net(pixel_values=torch.from_numpy(normalised).float()).logits
    (found,) = session.run(None, {"pixel_values": pixels if raw else normalised.astype(np.float32)})
    assert found == pytest.approx((expected.softmax(1) if raw else expected).numpy(), abs=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == CLASSES
    assert (json.loads(about["mean"]), json.loads(about["image_size"])) == (list(PIXELS.mean), 16)
    assert opset == onnx.load(path).opset_import[0].version
    assert session.get_inputs()[0].shape[1:] == [3, 16, 16]
    assert [path.name for path in path.parent.iterdir()] == ["model.onnx"]


def test_onnx_that_differs_is_not_left_behind(tmp_path: Path, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MOST_DIFFERENCE", -1.0)
    with pytest.raises(ValueError, match=r"onnxruntime and torch differ by"):
        export.onnx(tmp_path / "model.onnx", net, PIXELS, CLASSES)
    assert not list(tmp_path.iterdir())


def test_onnx_that_torch_cannot_write_is_one_line(tmp_path: Path, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.onnx.OnnxExporterError("no such operator\nand a hundred lines")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ValueError, match=r"cannot write this ViTForImageClassification as ONNX: no such operator$"):
        export.onnx(tmp_path / "model.onnx", net, PIXELS, CLASSES)


def test_onnx_names_what_is_not_installed(tmp_path: Path, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ValueError, match=r'ONNX needs onnxscript: pip install "vitdist\[onnx\]"'):
        export.onnx(tmp_path / "model.onnx", net, PIXELS, CLASSES)


# ---- the card ----------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "data": {"train": "/home/me/skin/train", "val": "/home/me/skin/val", "cache": "/scratch/me", "flip": 0.5},
    "model": {"pretrained": "google/vit-large-patch16-224-in21k", "drop_path": 0.1},
    "train": {"global_batch": 256, "epochs": 30.0},
    "optim": {"lr": 5e-5},
    "evaluation": {"export": "best", "best": "balanced_accuracy", "unsure": {"cost": 0.3}},
    "tracking": {"entity": "me"},
}
RECORD: dict[str, Any] = {
    "state": "done",
    "total_steps": 3600,
    "model": {
        "name": "google/vit-large-patch16-224-in21k",
        "weights": "weights of google/vit-large-patch16-224-in21k: 390 tensors loaded; new: classifier.bias",
        "parameters": 303304707,
    },
    "world": 8,
    "device": "NVIDIA H100 80GB HBM3",
    "precision": "fp16",
    "zero": 2,
    "batch": {"global_batch": 256, "micro_batch": 32, "accumulation": 1, "world": 8},
    "data": {
        "train": {
            "folder": "/home/me/skin/train",
            "samples": 30720,
            "classes": 3,
            "smallest_class": 512,
            "largest_class": 29000,
            "digest": "0123456789ab",
        },
        "val": {
            "folder": "/home/me/skin/val",
            "samples": 1001,
            "classes": 3,
            "smallest_class": 0,
            "largest_class": 900,
            "digest": "ba9876543210",
        },
    },
    "versions": {"torch": "2.15.0", "transformers": "5.23.0", "deepspeed": None},
}
EVALUATION: dict[str, Any] = {
    "step": 3240,
    "metrics": {
        "loss": 0.25,
        "top5": 1.0,
        "top1": 0.93,
        "macro_f1": 0.8,
        "balanced_accuracy": 0.85,
        "calibration_error": 0.021,
        "samples": 1000,
        "unreadable": 1,
    },
    "intervals": {"top1": [0.912, 0.944], "balanced_accuracy": [0.81, 0.89], "loss": [0.2, 0.31]},
    "classes": CLASSES,
    "confusion": [[855, 45, 0], [25, 75, 0], [0, 0, 0]],
    "per_class": [
        {
            "name": "mole",
            "support": 900,
            "precision": 0.972,
            "recall": 0.95,
            "f1": 0.961,
            "recall_interval": [0.934, 0.963],
        },
        {
            "name": "melanoma",
            "support": 100,
            "precision": 0.625,
            "recall": 0.75,
            "f1": 0.682,
            "recall_interval": [0.657, 0.825],
        },
        {"name": "a|b", "support": 0, "precision": 0.0, "recall": 0.0, "f1": 0.0, "recall_interval": None},
    ],
}


def settings(**changes: Any) -> Config:
    return config.parse(
        Config, config.override(SETTINGS, [f"{name}={value}" for name, value in changes.items()]), "test"
    )


def test_the_card_is_the_golden_one() -> None:
    """To accept another one: write `found` to the golden file and read the difference."""
    found = export.card("skin-7", settings(), RECORD, EVALUATION, PIXELS)
    assert found == GOLDEN.read_text(encoding="utf-8")


def test_the_card_is_read_as_the_hub_reads_it() -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(export.card("skin-7", settings(), RECORD, EVALUATION, PIXELS))
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.base_model == "google/vit-large-patch16-224-in21k"
    assert card.data.model_name == "skin-7"
    found = {result.metric_name: (result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert found["accuracy (top-1)"] == ("accuracy", 0.93)
    assert found["macro F1"] == ("f1", 0.8)
    assert {result.dataset_name for result in card.data.eval_results} == {"skin/val"}


def test_the_card_gives_the_settings_that_make_the_model_again() -> None:
    import yaml

    for changed in (
        settings(),
        settings(**{"data.train": "{/home/me/a/train: 2, /home/me/b/train: 1}", "optim.name": "sgd"}),
        settings(**{"model.pretrained": "null", "model.scratch": "{}", "evaluation.unsure": "null"}),
        settings(**{"model.lora.rank": 8, "data.class_shares": "{melanoma: 3}"}),
        # nothing but defaults: that the section is there turns it on
        settings(**{"model.lora": "{rank: 16, alpha: 16, targets: query-value}", "evaluation.unsure": "{}"}),
    ):
        text = export.card("x", changed, RECORD, EVALUATION, PIXELS)
        again = config.parse(Config, yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]), "card")
        names = {line.split(":")[0] for line in config.difference(changed, again)}
        assert names <= {"data.train", "data.val", "data.cache", "tracking.entity"}
        assert "/home/me" not in text
        assert "/scratch" not in text


@pytest.mark.parametrize(
    ("train", "told", "folder", "tabled"),
    [
        ("https://me:TOKEN@host/shards/train?sig=SECRET", "https://host/shards/train", None, None),
        ("https://me:TO::KEN@host/train", "https://host/train", None, None),
        ("file:///home/me/skin/train", "skin/train", None, None),
        (
            "stream:/home/me/x/{00..09}.tar::https://me:TOKEN@host/b.tar?sig=SECRET::{/home/me/c,/home/me/d}.tar",
            "stream:x/{00..09}.tar::https://host/b.tar::me/d}.tar",
            None,
            "x/{00..09}.tar::https://host/b.tar",  # the record leaves out what stands after a query
        ),
        ("stream:pipe:curl -H TOKEN https://host/a + b.tar::s3://a/b.tar", "stream:pipe:...::s3://a/b.tar", None, None),
        (
            "{/home/me/skin/train: 2, 'https://me:TOKEN@host/b?sig=SECRET': 1}",
            {"skin/train": 2.0, "https://host/b": 1.0},
            "/home/me/skin/train + https://host/b?...",
            "skin/train + https://host/b",
        ),
    ],
)
def test_the_card_tells_no_secrets(train: str, told: Any, folder: str | None, tabled: str | None) -> None:
    import yaml

    changes = {"data.train": train, "data.val": "https://me:TOKEN@host/val?sig=SECRET"}
    if train.startswith("stream:"):
        changes |= {"data.stream_samples": "9", "data.allow_pipe": "true"}
    asked = settings(**{"model.pretrained": "/home/me/models/vit/large"}, **changes)
    weights = {"weights": "weights of /home/me/models/vit/large: 390 tensors loaded"}
    of_train = {"folder": folder or storage.shown(str(asked.data.stream or asked.data.train))}
    data = {"train": of_train, "val": RECORD["data"]["val"] | {"folder": storage.shown(asked.data.val)}}
    record = RECORD | {"model": RECORD["model"] | weights, "data": data}
    text = export.card("x", asked, record, EVALUATION, PIXELS)
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["data"]["train"] == told
    assert f"| training ({tabled or str(told).removeprefix('stream:')}) |" in text
    assert "| validation (https://host/val) |" in text
    assert not [word for word in ("TOKEN", "KEN@", "SECRET", "curl", "/home", "sig=") if word in text]


def test_the_card_of_many_classes_is_short() -> None:
    names = [f"class {i}" for i in range(100)]
    rows = [
        {"name": n, "support": 1, "precision": 1.0, "recall": i / 100, "f1": 1.0, "recall_interval": [0.0, 1.0]}
        for i, n in enumerate(names)
    ]
    many = EVALUATION | {"classes": names, "per_class": rows, "confusion": np.eye(100, dtype=int).tolist()}
    text = export.card("x", settings(), RECORD, many, PIXELS)
    assert "the lowest recall first (the lowest 40 of 100)" in text
    assert text.count("| class ") == 40 + 1
    assert "class 19 and 80 more" in text


# ---- the command -------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, net: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path / "runs" / "skin-7")
    rundir.publish(run.config, config.to_yaml(settings()))
    rundir.publish_json(run.attempt(0).train, RECORD)
    rundir.publish_json(run.evaluation, EVALUATION)
    export.write(run.model, net, PIXELS, None)
    assert cli.main(["export", str(run.path), "--to", "hf"]) == 0
    card = (run.model / "README.md").read_text(encoding="utf-8")
    assert card == GOLDEN.read_text(encoding="utf-8")
    out = tmp_path / "out"
    assert cli.main(["export", str(run.path), "--to", "hf", "--out", str(out)]) == 0
    assert (out / "README.md").read_text(encoding="utf-8") == card
    assert (out / "model.safetensors").read_bytes() == (run.model / "model.safetensors").read_bytes()
    assert cli.main(["export", str(run.path), "--to", "onnx"]) == 0
    text = capsys.readouterr().out
    assert (run.path / "model.onnx").stat().st_size > 10_000
    assert "opset" in text
    assert "from torch" in text
    for arguments, reason in (
        ([str(run.model), "--to", "onnx"], "--out: where shall it go?"),
        ([str(run.path), "--to", "onnx", "--classes", "x.txt"], "names its classes itself"),
        ([str(run.path), "--to", "hf", "--out", str(tmp_path / "runs")], "is no model folder"),
        (["nowhere", "--to", "hf"], "no such run folder"),
        ([str(run.path), "--to", "hf", "model.image_size=64"], f"give its folder: {run.model}"),
        ([str(run.path), "--to", "hf", "--raw-pixels"], "--raw-pixels: is for --to onnx"),
    ):
        assert cli.main(["export", *arguments]) == 2
        assert reason in capsys.readouterr().err
