"""Finished models: the same pixels and probabilities as in evaluation, classes by name, refusals."""

import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from tests import inference_workers, ranks
from vitdist import cli, config, decision, dist, export, inference, model, rundir
from vitdist import evaluate as evaluate_
from vitdist.config import Pixels
from vitdist.data import transforms
from vitdist.data.index import Index, build
from vitdist.data.pack import pack
from vitdist.data.reader import Samples
from vitdist.dist import Processes
from vitdist.rundir import RunDir

CLASSES = ["blue", "green", "red"]
PIXELS = Pixels(image_size=16, eval_crop=0.8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
CPU = torch.device("cpu")
ALONE = Processes(rank=0, world=1, local_rank=0, node=0, local_world=1, device=CPU, control=None)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Processes:
    """One rank without a process group."""
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value])
    monkeypatch.setattr(Processes, "from_first", lambda self, value: value)
    monkeypatch.setattr(dist, "processes", lambda: contextlib.nullcontext(ALONE))
    return ALONE


def write_model(folder: Path, classes: list[str], seed: int = 0) -> None:
    """A tiny ViT that has learnt colours a little: it is often right and sometimes sure, and likes green."""
    shape = config.Scratch(patch_size=8, width=32, depth=2, heads=2)
    net, _ = model.build(config.Model(image_size=16, scratch=shape), classes, seed)
    generator = torch.Generator().manual_seed(1)
    colour = torch.tensor([["red", "green", "blue"].index(name) for name in classes])
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(15):
        labels = torch.randint(0, 3, (24,), generator=generator)
        images = torch.randint(0, 128, (24, 3, 16, 16), generator=generator, dtype=torch.uint8)
        images[torch.arange(24), colour[labels]] += 100
        loss = F.cross_entropy(net(pixel_values=transforms.normalise(images, PIXELS.mean, PIXELS.std)).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        net.classifier.bias[classes.index("green")] += 1.4
    export.write(folder, model.finished(net, net.state_dict()), PIXELS, "# a card\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, squares: Path) -> RunDir:
    """A run folder as far as a finished model needs it."""
    place = RunDir(tmp_path_factory.mktemp("runs") / "tiny")
    settings = config.parse(
        config.Config,
        {
            "data": {"train": f"{squares}/train", "val": f"{squares}/val", "eval_crop": 0.8},
            "model": {"image_size": 16, "scratch": {"patch_size": 8, "width": 32, "depth": 2, "heads": 2}},
            "train": {"global_batch": 12, "steps": 12},
        },
        "test",
    )
    rundir.publish(place.config, config.to_yaml(settings))
    write_model(place.model, CLASSES)
    return place


@pytest.fixture(scope="module")
def val(squares: Path) -> Index:
    return Index.open(squares / "val")


def photos(squares: Path, index: Index) -> list[str]:
    """The files that the samples of `index` were packed from, in its order."""
    return [str(squares.parent / "pictures" / "val" / index.source(i)) for i in range(len(index))]


def test_predictions_are_those_of_the_evaluation(alone: Processes, run: RunDir, squares: Path, val: Index) -> None:
    used = inference.load(str(run.path), [], CPU, data=str(val.folder))
    record, result = inference.evaluate(used, val, alone)
    answers = list(inference.predict(used, photos(squares, val)))
    assert [answer.error for answer in answers] == [""] * 21
    found = np.stack([answer.probabilities for answer in answers if answer.probabilities is not None])
    assert result.probabilities is not None
    assert np.array_equal(found, result.probabilities)
    assert len({row.tobytes() for row in found}) == 21
    assert record["metrics"]["top1"] == float((found.argmax(1) == val.labels).mean())
    assert set(record["intervals"]) >= {"top1", "balanced_accuracy"}


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_probabilities_in_plain_torch(run: RunDir, squares: Path, val: Index, tta: str) -> None:
    paths = photos(squares, val)[:5]
    used = inference.load(str(run.path), [f"evaluation.tta={tta}"], CPU)
    from transformers import ViTForImageClassification

    net = ViTForImageClassification.from_pretrained(run.model).double()
    expected = []
    for path in paths:
        # 20 x 24 pixels: the central 16 x 16 of the short side resized to 20 is the central 16 x 16 itself.
        pixels = np.asarray(Image.open(path))[2:18, 4:20].transpose(2, 0, 1) / 255
        image = torch.from_numpy((pixels - np.reshape(PIXELS.mean, (3, 1, 1))) / np.reshape(PIXELS.std, (3, 1, 1)))
        views = [image] if tta == "none" else [image, image.flip(-1)]
        expected.append(net(pixel_values=torch.stack(views)).logits.softmax(1).mean(0).detach().numpy())
    found = [answer.probabilities for answer in inference.predict(used, paths)]
    assert np.stack([row for row in found if row is not None]) == pytest.approx(np.stack(expected), abs=1e-5)


def test_batches_and_loader_processes_change_nothing(run: RunDir, squares: Path, val: Index) -> None:
    used = inference.load(str(run.path), [], CPU)
    paths = photos(squares, val)
    whole = list(inference.predict(used, paths))
    parts = list(inference.predict(used, paths, batch=4, workers=2))
    assert [answer.path for answer in parts] == [answer.path for answer in whole] == paths
    for one, other in zip(parts, whole, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


def test_odd_pictures_give_the_pixels_that_their_shards_give(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 255, (70, 90, 3), dtype=np.uint8)
    grey = Image.fromarray(generator.integers(0, 65535, (40, 30), dtype=np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    folder = tmp_path / "pictures" / "train" / "a"
    folder.mkdir(parents=True)
    image = Image.fromarray(colours)
    image.save(folder / "plain.jpg", quality=90)
    image.save(folder / "turned.jpg", exif=turned)
    image.save(folder / "old.bmp")
    image.save(folder / "turned.tif", exif=turned)
    grey.save(folder / "grey.tiff")
    grey.save(folder / "grey.png")
    image.convert("P").save(folder / "palette.png")
    image.convert("CMYK").save(folder / "print.jpg")
    image.save(folder / "web.webp")
    other = tmp_path / "pictures" / "train" / "b"
    other.mkdir()
    image.save(other / "1.png")
    pack(tmp_path / "pictures", tmp_path / "shards", workers=1, progress=False)
    index = Index.open(tmp_path / "shards" / "train")
    settings = config.Data(train="none", val="none", eval_crop=0.9)
    expected = Samples(index, settings, 32, 0, training=False).__getitems__([(0, i) for i in range(len(index))])
    paths = [str(tmp_path / "pictures" / "train" / index.source(i)) for i in range(len(index))]
    found = inference.Pictures(paths, settings, 32).__getitems__(range(len(paths)))
    assert torch.equal(found.images, expected.images)
    assert len(paths) == 10
    assert found.mask.all()
    assert found.images.float().std((1, 2, 3)).min() > 5


def test_the_pipeline_of_transformers_agrees(run: RunDir, squares: Path, val: Index) -> None:
    from transformers import pipeline

    paths = photos(squares, val)
    classify = pipeline("image-classification", model=str(run.model), top_k=3)
    theirs = [{one["label"]: one["score"] for one in answer} for answer in classify(paths)]
    mine = list(inference.predict(inference.load(str(run.model), [], CPU), paths))
    for answer, other in zip(mine, theirs, strict=True):
        assert answer.probabilities == pytest.approx([other[name] for name in CLASSES], abs=1e-2)


def broken_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(1)
    for name in ("a", "c"):
        Image.fromarray(generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "b.jpg").write_text("no picture")
    (folder / "notes.txt").write_text("left out")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:300])
    (folder / ".hidden.png").write_text("left out")
    return folder


def test_broken_pictures_are_told_and_cost_no_other(
    tmp_path: Path, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = broken_folder(tmp_path / "deep" / "photos")
    table = tmp_path / "table.csv"
    assert cli.main(["predict", str(run.path), str(tmp_path / "deep"), "--csv", str(table)]) == 1
    with open(table, newline="") as file:
        rows = {Path(row["path"]).name: row for row in csv.DictReader(file)}
    assert list(rows) == ["a.png", "b.jpg", "c.png", "cut.png"]
    assert rows["b.jpg"]["error"] == "not decodable: begins with b'no p'"
    assert "truncated" in rows["cut.png"]["error"]
    assert rows["b.jpg"]["predicted"] == rows["b.jpg"]["p(red)"] == ""
    alone = {}
    for name in ("a.png", "c.png"):
        row = rows[name]
        chances = {c: float(row[f"p({c})"]) for c in CLASSES}
        assert row["predicted"] == max(chances, key=lambda c: chances[c])
        assert float(row["confidence"]) == max(chances.values())
        assert sum(chances.values()) == pytest.approx(1, abs=1e-4)
        assert cli.main(["predict", str(run.path), str(folder / name)]) == 0
        (alone[name],) = csv.DictReader(io.StringIO(capsys.readouterr().out))
        assert float(alone[name]["confidence"]) == pytest.approx(float(row["confidence"]), abs=1e-5)
    assert cli.main(["predict", str(run.path), str(folder), "--top", "2"]) == 1
    captured = capsys.readouterr()
    head, first, *_ = csv.reader(io.StringIO(captured.out))
    assert head == ["path", "predicted", "confidence", "predicted_2", "confidence_2", "error"]
    second = sorted(CLASSES, key=lambda c: -float(rows["a.png"][f"p({c})"]))[1]
    assert first[3:] == [second, pytest.approx(rows["a.png"][f"p({second})"]), ""]
    assert f"could not be read: {folder}/b.jpg: not decodable" in captured.err
    assert "4 pictures in" in captured.err
    assert "2 of them could not be read" in captured.err


def test_a_terminal_gets_a_table(
    tmp_path: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = broken_folder(tmp_path / "photos")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["predict", str(run.path), str(folder)]) == 1
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert lines[0].split() == ["path", "predicted", "confidence", "error"]
    assert len([line for line in lines if str(folder) in line]) == 4


def test_a_file_of_a_failed_prediction_is_not_there(tmp_path: Path, run: RunDir, monkeypatch: Any) -> None:
    folder = broken_folder(tmp_path / "photos")

    def fail(*_: Any) -> Iterator[inference.Answer]:
        yield inference.Answer("a.png", np.array([1.0, 0.0, 0.0], np.float32), "")
        raise ValueError("broken off")

    monkeypatch.setattr(inference, "predict", fail)
    assert cli.main(["predict", str(run.path), str(folder), "--csv", str(tmp_path / "table.csv")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_pictures_are_found_once_and_in_order(tmp_path: Path, squares: Path) -> None:
    folder = squares.parent / "pictures" / "val" / "red"
    one = str(folder / "3.png")
    found = inference.pictures([one, str(folder)])
    assert found == [one, *(str(folder / f"{i}.png") for i in (0, 1, 2, 4, 5, 6))]


def test_a_path_that_is_no_unicode_can_be_written() -> None:
    assert inference.printable("caf\udce9/1.png") == "caf\\udce9/1.png"


# ---- classes -----------------------------------------------------------------------------------


def test_classes_in_another_order_are_matched_by_name(
    tmp_path: Path, alone: Processes, run: RunDir, val: Index
) -> None:
    """The same network with its head's rows in another order must measure the same."""
    from transformers import ViTForImageClassification

    order = [2, 0, 1]
    net = ViTForImageClassification.from_pretrained(run.model)
    with torch.no_grad():
        net.classifier.weight.copy_(net.classifier.weight[order].clone())
        net.classifier.bias.copy_(net.classifier.bias[order].clone())
    names = [CLASSES[i] for i in order]
    net.config.id2label, net.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    unsure = config.Unsure(costs={"red": {"blue": 5.0}, "green": {"red": 0.1}}, cost=0.3)
    export.write(tmp_path / "turned", net, PIXELS, None, decision.of(unsure, names))
    rule = ["evaluation.unsure.costs={red: {blue: 5}, green: {red: 0.1}}", "evaluation.unsure.cost=0.3"]
    straight, one = inference.evaluate(inference.load(str(run.path), rule, CPU), val, alone)
    turned, other = inference.evaluate(inference.load(str(tmp_path / "turned"), [], CPU), val, alone)
    assert np.array_equal(straight["confusion"], turned["confusion"])
    assert straight["decision"]["confusion"] == turned["decision"]["confusion"]
    assert straight["decision"]["costs"] == turned["decision"]["costs"]
    assert straight["decision"]["mean_cost"] == pytest.approx(turned["decision"]["mean_cost"])
    assert one.metrics["top1"] > 0.6  # by chance it would be 0.33
    assert other.probabilities == pytest.approx(one.probabilities, abs=1e-6)
    assert turned["notes"] == ["model and data count their classes in another order: matched by name"]
    assert straight["notes"] == []


@pytest.mark.parametrize(
    ("mine", "reason"),
    [
        (["blue", "green", "violet"], r"the model alone has violet; the data alone have red"),
        (["blue", "green"], r"3 classes are not the model's 2 \(the data alone have red\)"),
        (["LABEL_0", "LABEL_1"], r"the model alone has LABEL_0, LABEL_1; the data alone have blue, green, red"),
    ],
)
def test_other_classes_are_refused(mine: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        inference.class_order(mine, CLASSES, "shards")


def test_classes_without_names_count_as_the_data_do() -> None:
    order, note = inference.class_order(["LABEL_0", "LABEL_1", "LABEL_2"], CLASSES, "shards")
    assert order == [0, 1, 2]
    assert note == "the model does not name its classes: its numbers are taken for the data's"


# ---- sources -----------------------------------------------------------------------------------


def test_a_file_of_weights_measures_as_timm_does(tmp_path: Path, alone: Processes, val: Index) -> None:
    torch.manual_seed(0)
    net = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=3
    ).eval()
    with torch.no_grad():
        net.head.weight.normal_()
    path = tmp_path / "weights.safetensors"
    save_file(net.state_dict(), path)
    told = ["model.heads=3", "model.layer_norm_eps=1e-6", "model.activation=gelu", "data.eval_crop=0.8"]
    told += ["data.mean=[0.4,0.5,0.6]", "data.std=[0.2,0.25,0.3]"]
    used = inference.load(str(path), told, CPU, CLASSES)
    assert used.pixels == PIXELS  # the size is that of the file's positions
    record, result = inference.evaluate(used, val, alone)
    samples = Samples(val, used.settings.data, 16, 0, training=False).__getitems__([(0, i) for i in range(21)])
    with torch.no_grad():
        expected = net(used.inputs(samples)).softmax(1)
    assert result.probabilities == pytest.approx(expected.numpy(), abs=1e-5)
    assert "do not name" in " ".join(record["notes"]) or "does not name its classes" in " ".join(record["notes"])
    with pytest.raises(ValueError, match=r"does not name its classes: make a folder of it, vitdist export"):
        inference.load(str(path), told, CPU)
    with pytest.raises(ValueError, match=r"model\.heads"):
        inference.load(str(path), told[1:], CPU, CLASSES)
    with pytest.raises(ValueError, match=r"data\.mean and data\.std must be given"):
        inference.load(str(path), told[:4], CPU, CLASSES)
    # as a folder it has its classes and tells its pixels
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(CLASSES))
    out = str(tmp_path / "folder")
    assert cli.main(["export", str(path), "--to", "hf", "--out", out, "--classes", str(names), *told]) == 0
    again = inference.load(out, [], CPU)
    assert (again.classes, again.pixels) == (CLASSES, PIXELS)
    assert torch.equal(again.logits(used.inputs(samples)), used.logits(used.inputs(samples)))


def test_what_is_no_source_is_told(tmp_path: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    unfinished = RunDir(Path("runs/young"))
    rundir.publish(unfinished.config, run.config.read_text())
    record = {"state": "stopped", "step": 5, "total_steps": 12}
    rundir.publish_json(unfinished.attempt(0).train, record)
    Path("empty").mkdir()
    for source, reason in {
        "runs/young": r"a run without a model yet \(stopped at step 5 of 12\)",
        "runs/yuong": r"no such run folder.*did you mean runs/young",
        "./nowhere": "no such run folder, model folder or file of weights",
        "empty": r"is neither a run folder \(config\.yaml\) nor a model",
        "missing.pth": r"missing\.pth: no such file of weights",
    }.items():
        with pytest.raises(ValueError, match=reason):
            inference.find(source)
    assert inference.find("google/vit-base-patch16-224") == ("google/vit-base-patch16-224", None, False)


def test_settings_are_over_what_the_folder_says(run: RunDir) -> None:
    used = inference.load(str(run.model), ["model.image_size=32", "data.eval_crop=1.0"], CPU)
    assert used.pixels == PIXELS.model_copy(update={"image_size": 32, "eval_crop": 1.0})
    assert "resized: position_embeddings 2x2 to 4x4" in used.weights
    assert used.logits(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"optim\.lr=1: has no effect on a finished model"):
        inference.load(str(run.model), ["optim.lr=1"], CPU)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("engine.precision=bf16", "data, model, evaluation have"),
        ("data.val=https://me:TOKEN@host/val", "--data SHARDS"),
        ("data.train=shards/train", "--data SHARDS"),
        ("model.pretrained=google/vit-base-patch16-224", "the one that the command names"),
        ("model.scratch.depth=2", "the one that the command names"),
        ("model.scratch=null", "the one that the command names"),
        ("model.head=new", "keeps its head"),
    ],
)
def test_settings_that_the_command_says_itself_are_refused(run: RunDir, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="has no effect on a finished model") as caught:
        inference.load(str(run.model), [text], CPU)
    told = str(caught.value)
    assert told.startswith(text.partition("=")[0].removesuffix(".depth"))
    assert reason in told
    assert "\n" not in told
    assert "TOKEN" not in told


# ---- decisions ---------------------------------------------------------------------------------


def test_a_rule_is_kept_with_the_model_and_followed(
    tmp_path: Path, alone: Processes, run: RunDir, squares: Path, val: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    export.copy(run.model, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in run.model.iterdir())
    shards, rule = str(squares / "val"), ["evaluation.unsure.cost=0.3", "evaluation.unsure.costs={red: {blue: 5}}"]
    assert cli.main(["evaluate", str(folder), "--data", shards, "--json", "-", *rule, "--write-decision"]) == 0
    first = json.loads(capsys.readouterr().out)["decision"]
    kept = decision.Decision.load(folder)
    assert kept is not None
    assert (kept.classes, kept.unsure, kept.costs[2]) == (CLASSES, 0.3, [5.0, 1.0, 0.0])
    # from then on it is applied without being asked for
    assert cli.main(["evaluate", str(folder), "--data", shards, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["decision"] == first
    assert cli.main(["predict", str(folder), str(squares.parent / "pictures" / "val")]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    chances = np.array([[float(row[f"p({name})"]) for name in CLASSES] for row in rows])
    assert [row["decision"] for row in rows] == kept.apply(chances)
    assert {row["decision"] for row in rows} > {"unsure"}
    # of a model whose classes stand in another order
    (folder / "decision.json").write_text(json.dumps(kept.to_json() | {"classes": CLASSES[::-1]}))
    with pytest.raises(ValueError, match=r"decision\.json: is for other classes"):
        inference.load(str(folder), [], CPU)


def test_a_rule_to_keep_must_be_given(alone: Processes, run: RunDir, squares: Path, capsys: Any) -> None:
    assert cli.main(["evaluate", str(run.model), "--data", str(squares / "val"), "--write-decision"]) == 2
    assert "evaluation.unsure.cost" in capsys.readouterr().err
    assert not (run.model / "decision.json").exists()


def test_a_rule_of_unknown_classes_is_refused_before_the_work(
    tmp_path: Path, alone: Processes, run: RunDir, squares: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(evaluate_, "evaluate", lambda *_, **__: pytest.fail("the whole evaluation was in vain"))
    unnamed = tmp_path / "unnamed"
    export.copy(run.model, unnamed)
    told = json.loads((unnamed / "config.json").read_text())
    names = {str(i): f"LABEL_{i}" for i in range(3)}
    told |= {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    (unnamed / "config.json").write_text(json.dumps(told))
    shards = str(squares / "val")
    of_data, of_none = "evaluation.unsure.costs={red: {blue: 5}}", "evaluation.unsure.costs={rde: {blue: 5}}"
    assert cli.main(["evaluate", str(unnamed), "--data", shards, of_data, "--write-decision"]) == 2
    assert "'red' is no class" in capsys.readouterr().err
    assert cli.main(["evaluate", str(run.model), "--data", shards, of_none]) == 2
    assert "'rde' is no class of the data; did you mean 'red'?" in capsys.readouterr().err


# ---- the commands ------------------------------------------------------------------------------


def test_evaluate_tells_tables_and_json(
    tmp_path: Path, alone: Processes, run: RunDir, squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, shards = tmp_path / "found.json", str(squares / "val")
    point = ["--recall-of", "red", "--at-precision", "0.1"]
    arguments = ["evaluate", str(run.path), "evaluation.bootstrap=50", "--data", shards, "--json", str(out), *point]
    assert cli.main([*arguments, "--batch", "5", "--tta", "flip", "data.workers=0"]) == 0
    found = json.loads(out.read_text())
    assert (found["tta"], found["schema"], found["metrics"]["samples"]) == ("flip", rundir.SCHEMA, 21)
    assert found["data"]["digest"] == Index.open(shards).digest[:12]
    assert found["pixels"] == config.to_plain(PIXELS)
    assert found["operating_point"]["class"] == "red"
    assert found["operating_point"]["recall"] == 1.0  # at that precision all may be called red
    text = capsys.readouterr()
    assert "accuracy (top-1)" in text.out
    assert f"{100 * found['metrics']['top1']:.1f} %" in text.out
    assert "with their mirror images" in text.out
    assert "red from a probability of" in text.out
    assert "72 tensors" in text.err or "tensors loaded" in text.err
    assert cli.main(["evaluate", str(run.path), "--data", shards, "--recall-of", "pink", "--at-precision", "0.5"]) == 2
    assert "there is no class 'pink'; there are: blue, green, red" in capsys.readouterr().err


def test_a_broken_sample_is_named_and_left_out(
    tmp_path: Path, alone: Processes, run: RunDir, squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "val"
    folder.mkdir()
    for path in (squares / "val").iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    index = Index.open(folder)
    (shard,) = folder.glob("*.tar")
    content = bytearray(shard.read_bytes())
    content[int(index.columns["offset"][4]) + int(index.columns["image_offset"][4]) + 40] ^= 0xFF
    shard.write_bytes(content)
    assert cli.main(["evaluate", str(run.path), "--data", str(folder)]) == 1
    text = capsys.readouterr()
    assert f"could not be read: {index.key(4)} of" in text.err
    assert "20 samples, 1 could not be read" in text.out


def published(tmp_path: Path, run: RunDir, name: str, top1: float, classes: list[str] = CLASSES) -> str:
    place = RunDir(tmp_path / name)
    rundir.publish(place.config, run.config.read_text())
    counts = [[3, 1, 0], [0, 4, 0], [1, 0, 3]]
    rows = [
        {"name": name, "support": 4, "recall": r, "precision": 0.8, "f1": 0.7, "recall_interval": [0.2, 0.9]}
        for name, r in zip(classes, (0.75, 1.0, 0.75), strict=True)
    ]
    metrics = {"top1": top1, "loss": 0.5, "samples": 12, "unreadable": 0}
    record = {"step": 7, "metrics": metrics, "classes": classes, "confusion": counts, "per_class": rows}
    rundir.publish_json(place.evaluation, record)
    return str(place.path)


def test_runs_are_compared_by_their_own_evaluations(
    tmp_path: Path, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [published(tmp_path, run, f"seed-{i}", top1) for i, top1 in enumerate((0.7, 0.8, 0.9))]
    assert cli.main(["evaluate", *places, "--json", str(tmp_path / "all.json")]) == 0
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["mean", "of", "3", "80.0", "%", "0.500"] in lines
    assert ["standard", "deviation", "10.0", "%", "0.000"] in lines
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["spread"]["top1"] == {"mean": pytest.approx(0.8), "deviation": pytest.approx(0.1), "runs": 3}
    assert list(found["runs"]) == places
    assert cli.main(["evaluate", places[0]]) == 0
    text = capsys.readouterr().out
    assert "after 7 updates: 12 samples" in text
    assert [line.split("│")[1].strip() for line in text.splitlines() if "│" in line][-3:] == ["blue", "red", "green"]
    other = published(tmp_path, run, "other", 0.5, ["blue", "green", "pink"])
    for arguments, reason in (
        ([*places, other], "measured other classes"),
        ([places[0], places[0]], "named twice"),
        ([str(run.path)], "has no evaluation yet (state: submitted)"),
        ([str(run.model)], "is no run folder"),
        ([places[0], "--tta", "flip"], "--tta needs --data"),
        ([places[0], "data.mean=[0,0,0]"], "settings need --data"),
        ([*places, "--data", "x"], "--data measures one model, not 3"),
        ([places[0], "--data", "x", "--recall-of", "red"], "belong together"),
    ):
        assert cli.main(["evaluate", *arguments]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.processes
def test_every_world_counts_the_same(tmp_path: Path, alone: Processes, run: RunDir, squares: Path) -> None:
    arguments = ["evaluate", str(run.path), "--data", str(squares / "val"), "--batch", "4", "--json"]
    assert cli.main([*arguments, str(tmp_path / "1.json")]) == 0
    found = {1: json.loads((tmp_path / "1.json").read_text())}
    for world in (2, 3):
        out = tmp_path / f"{world}.json"
        answers = ranks.run(inference_workers.command, world, [*arguments, str(out)], str(tmp_path / "log"))
        assert [code for code, _ in answers] == [0] * world, answers
        found[world] = json.loads(out.read_text())
    assert [found[world].pop("ranks") for world in found] == [1, 2, 3]
    assert found[1]["confusion"] == found[2]["confusion"] == found[3]["confusion"]
    assert found[1]["metrics"] == pytest.approx(found[2]["metrics"], abs=1e-6)
    assert found[1]["metrics"] == pytest.approx(found[3]["metrics"], abs=1e-6)


def test_shards_of_other_classes_are_refused(
    tmp_path: Path, alone: Processes, run: RunDir, squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "val"
    folder.mkdir()
    (shard,) = (squares / "val").glob("*.tar")
    (folder / shard.name).write_bytes(shard.read_bytes())
    build(folder, None, 1)
    assert cli.main(["evaluate", str(run.path), "--data", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "classes are not the model's 3" in error
    assert "vitdist index --classes" in error
