"""What a data set holds, and what is in it twice. python -m pytest tests/vitdist/data/test_stats.py"""

import functools
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitdist.data import duplicates, stats, stats_page, survey
from vitdist.data.index import build
from vitdist.data.survey import Stats, measure, record, sentences

CLASSES = ["ant", "bee", "<cat> [x]"]
Member = tuple[str, bytes, str, str]
"""Class, picture, group and path of a sample."""


def scene(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Something like a photograph: detail on every scale, the coarse stronger, as in nature (1/f)."""
    rng = np.random.default_rng(seed)
    width, height = size
    pixels = np.zeros((height, width, 3))
    for side in (2, 4, 8, 16, 32, 64):
        layer = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        pixels += np.asarray(layer.resize(size, Image.Resampling.BICUBIC)) / side
    low, high = pixels.min(), pixels.max()
    return Image.fromarray(((pixels - low) * (255 / (high - low))).astype(np.uint8))


def saved(image: Image.Image, form: str = "JPEG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def put_set(folder: Path, members: list[Member], classes: list[str] = CLASSES) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for number, (label, picture, group, path) in enumerate(members):
            parts = {"cls": label.encode(), "jpg": picture, "path": path.encode(), "group": group.encode()}
            for extension, content in parts.items():
                if content:
                    info = tarfile.TarInfo(f"{number:04d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    build(folder, classes, workers=1)


look = functools.partial(measure, workers=1, progress=False)


def told(found: Stats) -> dict[tuple[str, str], tuple[str, bool]]:
    """Paths of each pair, and what it means."""
    return {
        (pair["first"]["path"], pair["second"]["path"]): (pair["kind"], pair["same_file"])
        for pair in record(found)["pairs"]
    }


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures in train; of some a copy in train or val, a group on both sides, a broken picture."""
    folder = tmp_path_factory.mktemp("sets") / "troubled"
    images = [scene(n) for n in range(20)]
    train = [(CLASSES[n % 3], saved(images[n], quality=92), f"g{n}", f"{n}.jpg") for n in range(12)]
    train.append((CLASSES[0], train[3][1], "g3", "3 again.jpg"))
    small = images[6].resize((90, 70), Image.Resampling.BICUBIC)
    val = [
        (CLASSES[1], saved(images[4], quality=60), "h4", "4 at 60.jpg"),
        (CLASSES[2], saved(images[5], quality=60), "h5", "5 at 60.jpg"),
        (CLASSES[1], saved(small, "PNG"), "h6", "6 small.png"),
        (CLASSES[2], train[8][1], "h8", "8 same.jpg"),
        (CLASSES[0], saved(images[15]), "g1", "15.jpg"),
        (CLASSES[1], saved(images[16]), "g1", "16.jpg"),
        (CLASSES[1], saved(images[17])[:900], "h17", "17 cut.jpg"),
    ]
    put_set(folder / "train", train)
    put_set(folder / "val", val)
    return folder


@pytest.fixture(scope="module")
def seen(troubled: Path) -> Stats:
    return look([troubled])


def test_copies_are_found_and_nothing_else(seen: Stats) -> None:
    assert told(seen) == {
        ("6.jpg", "6 small.png"): ("labels differ", False),
        ("8.jpg", "8 same.jpg"): ("across splits", True),
        ("4.jpg", "4 at 60.jpg"): ("across splits", False),
        ("5.jpg", "5 at 60.jpg"): ("across splits", False),
        ("3.jpg", "3 again.jpg"): ("within a split", True),
    }
    kinds = [pair["kind"] for pair in record(seen)["pairs"]]
    assert kinds == ["labels differ", *["across splits"] * 3, "within a split"]


def test_what_is_said(seen: Stats) -> None:
    assert sentences(seen) == [
        "1 pair of pictures (1 nearly alike) with different labels: one of the two is wrong",
        "4 of val (57.1 %) are in train too: they measure memory",
        "1 group on both sides of a split: what is measured there is too good",
        "1 pair of pictures (1 of the same file) within one split and class: they weigh twice",
        "1 broken sample: run vitdist verify",
    ]


def test_record(seen: Stats) -> None:
    found = record(seen)
    assert json.loads(json.dumps(found)) == found
    assert found["classes"][0] == {"name": "ant", "share": 0.3, "train": 5, "val": 1}
    assert found["imbalance"] == {"train": 1.25, "val": 4.0}
    assert found["width"] == {"min": 90, "median": 160, "max": 160}
    assert found["formats"] == {"JPEG": 18, "PNG": 1}
    assert found["groups_across_splits"] == [{"group": "g1", "train": 1, "val": 2}]
    assert [sample["path"] for sample in found["broken"]] == ["17 cut.jpg"]
    assert found["colours_measured_on"] == 19


def test_different_pictures_are_no_copies(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (150, 64, 80, 3), dtype=np.uint8)
    images = [saved(scene(1000 + n, (80, 64)), quality=80) for n in range(150)]
    images += [saved(Image.fromarray(pixels), quality=80) for pixels in noise]
    images += [saved(Image.new("RGB", (64, 64), (n, n, n))) for n in range(0, 250, 50)]  # one colour each
    put_set(tmp_path / "set", [("ant", image, "", f"{n}.jpg") for n, image in enumerate(images)])
    found = look([tmp_path / "set"])
    assert len(found.labels) == 305
    assert found.pairs == []
    assert found.groups is None


@pytest.mark.parametrize("grey", [False, True])
def test_colours_are_those_of_all_pixels(tmp_path: Path, grey: bool) -> None:
    images = [scene(n, (300, 280)).convert("L" if grey else "RGB") for n in range(6)]
    members = [("ant", saved(image, "PNG" if n % 2 else "JPEG"), "", str(n)) for n, image in enumerate(images)]
    put_set(tmp_path / "set", members)
    pixels = np.concatenate([np.asarray(image.convert("RGB")).reshape(-1, 3) for image in images]) / 255
    mean, deviation, measured = survey.colours(look([tmp_path / "set"]).look)
    assert measured == 6
    assert np.abs(mean - pixels.mean(0)).max() < 0.01
    assert np.abs(deviation - pixels.std(0)).max() < 0.01


def test_samples_are_drawn_alike_every_time(troubled: Path) -> None:
    few = [survey.colours(look([troubled], samples=5).look) for _ in range(2)]
    assert few[0] == few[1]
    assert few[0][2] in (4, 5)  # the broken one may be among the five
    assert survey.colours(look([troubled], samples=5, seed=1).look) != few[0]


def test_turned_pictures_and_large_ones(tmp_path: Path) -> None:
    image = scene(3, (1200, 800))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees to the right
    turned = image.transpose(Image.Transpose.ROTATE_90)
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=exif)
    put_set(tmp_path / "set", [("ant", buffer.getvalue(), "", "turned"), ("bee", saved(image), "", "upright")])
    found = look([tmp_path / "set"])
    assert found.look.width.tolist() == [1200, 1200]
    assert told(found) == {("turned", "upright"): ("labels differ", False)}


def test_a_crowd_of_copies_stays_small(tmp_path: Path) -> None:
    page = scene(5, (100, 90))
    members = [("ant", saved(page, quality=60 + n % 36), "", f"{n}.jpg") for n in range(72)]
    put_set(tmp_path / "set", [*members, ("bee", saved(scene(6)), "", "other")])
    found = look([tmp_path / "set"])
    assert sum(pair.exact for pair in found.pairs) == 36
    assert {pair.second for pair in found.pairs} == set(range(1, 72))


def test_candidates_are_all_pairs_within_the_distance() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    for n in range(150, 300):
        for bit in rng.choice(64, rng.integers(0, 11), replace=False).tolist():
            hashes[n] ^= np.uint64(1 << bit) if n % 2 else np.uint64(0)
        hashes[n] = hashes[n] if n % 2 else hashes[n - 150]
    found = {tuple(pair) for part in duplicates._close(hashes) for pair in part.T.tolist()}
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None])
    assert found == {tuple(pair) for pair in np.argwhere(np.triu(bits <= duplicates.DISTANCE, 1)).tolist()}
    assert len(found) >= 75


def test_the_command(troubled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats.run([troubled], json_file=tmp_path / "all.json", out=tmp_path / "page.html", workers=2)
    said = capsys.readouterr().out
    assert "<cat> [x]" in said
    assert "labels differ: train 0006 6.jpg [ant] = val 0002 6 small.png [bee]" in said
    assert "group across splits: g1: 1 in train, 2 in val" in said
    assert json.loads((tmp_path / "all.json").read_text())["splits"]["val"]["samples"] == 7
    page = (tmp_path / "page.html").read_text()
    assert "&lt;cat&gt; [x]" in page
    assert "<cat>" not in page
    assert page.count("data:image/jpeg") == 2 * 5 + 3 * 6  # both of each pair, six examples of a class
    for name, start in (("c.svg", b"<svg"), ("c.png", b"\x89PNG")):
        stats.run([troubled / "train"], out=tmp_path / name, workers=1)
        assert (tmp_path / name).read_bytes().startswith(start)
    stats.run([troubled / "train", troubled / "val"], workers=1)
    assert (troubled / "stats.html").exists()


def test_many_classes_are_folded(tmp_path: Path) -> None:
    classes = [f"class {n}" for n in range(60)]
    members = [(name, saved(scene(n, (40, 40))), "", name) for n, name in enumerate(classes)]
    put_set(tmp_path / "set", members, classes)
    page = stats_page.page(look([tmp_path / "set"]))
    assert "44 classes between" in page
    assert page.count("<li><div") == 60


def test_splits_of_other_classes_and_clear_errors(troubled: Path, tmp_path: Path) -> None:
    put_set(tmp_path / "test", [("dog", saved(scene(1)), "", "1"), ("ant", saved(scene(2)), "", "2")], ["dog", "ant"])
    found = look([troubled / "val", tmp_path / "test"])
    assert found.classes == [*CLASSES, "dog"]
    assert found.counts.tolist() == [[1, 4, 2, 0], [1, 0, 0, 1]]
    assert "val has no sample of dog" in sentences(found)
    with pytest.raises(ValueError, match="no such folder"):
        look([tmp_path / "none"])
    with pytest.raises(ValueError, match="is given twice"):
        look([troubled / "val", troubled / "val"])
    with pytest.raises(ValueError, match="--samples 0: at least 1"):
        look([troubled], samples=0)
    with pytest.raises(ValueError, match=r"ends in \.html, \.svg or \.png"):
        stats.run([troubled], out="x.pdf")


def test_where_the_page_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/train").mkdir(parents=True)
    assert stats._beside(["a/train", str(tmp_path / "a/val")]) == tmp_path / "a"
    assert stats._beside(["a/train"]) == tmp_path / "a/train"
    assert stats._beside(["https://host/a/train", "https://host/a/val"]) == Path()
    monkeypatch.setattr(stats.os, "access", lambda folder, mode: False)
    assert stats._beside(["a/train"]) == Path()
