"""Packing folders of pictures. python -m pytest tests/vitdist/data/test_pack.py"""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitdist.data.index import Index
from vitdist.data.pack import pack, write_digits


def picture(seed: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Classes of 8, 8 and 2 pictures; names in several scripts, nested, in every accepted format."""
    folder = tmp_path / "pictures"
    forms = {"jpg": "JPEG", "JPEG": "JPEG", "png": "PNG", "webp": "WEBP"}
    for i in range(8):
        extension = list(forms)[i % 4]
        put(folder / "Brüche" / f"übung {i}.v1.{extension}", picture(i, forms[extension]))
        put(folder / "猫" / f"tief/tiefer/{i}.{extension}", picture(100 + i, forms[extension]))
    for i in range(2):
        put(folder / "rare" / f"{i}.png", picture(200 + i))
    put(folder / "rare" / "Thumbs.db", b"")
    put(folder / "rare" / "._0.png", b"")
    put(folder / ".cache" / "0.png", b"")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def by_source(folder: Path) -> dict[str, tuple[str, bytes]]:
    opened = Index.open(folder)
    return {opened.source(i): (opened.classes[opened.labels[i]], opened.image(i)) for i in range(len(opened))}


def test_packs_the_original_bytes(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(pictures, tmp_path / "out", workers=1)
    expected = {
        str(p.relative_to(pictures)): (p.relative_to(pictures).parts[0], p.read_bytes())
        for p in pictures.rglob("*")
        if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")
        and not p.name.startswith(".")
        and ".cache" not in p.parts
    }
    assert len(expected) == 18
    assert by_source(tmp_path / "out/train") == expected
    said = capsys.readouterr().out
    assert "packed 18 pictures of 3 classes" in said
    assert "left out 1 files" in said
    assert "no validation set" in said
    assert "--val-fraction 0.1" in said
    with tarfile.open(tmp_path / "out/train/shard-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "vitdist", 0o444)}
        assert tar.getnames()[0] == "000000000.cls"


def test_same_bytes_for_any_number_of_workers(pictures: Path, tmp_path: Path) -> None:
    for out, workers in (("one", 1), ("three", 3)):
        pack(pictures, tmp_path / out, workers=workers, shard_samples=4, val_fraction=0.25)
    first = contents(tmp_path / "one")
    assert first == contents(tmp_path / "three")
    assert "train/shard-000002.tar" in first


def test_goes_on_after_an_interruption(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    pack(pictures, out, workers=2, shard_samples=5)
    whole = contents(out)
    kept = (out / "train/shard-000001.tar").stat()
    for name in ("index.json", "index.npy", "classes.txt", "shard-000000.tar"):
        (out / "train" / name).unlink()
    (out / "train/.shard-000000.tar.4711").write_bytes(b"half")
    pack(pictures, out, workers=2, shard_samples=5)
    assert contents(out) == whole
    assert (out / "train/shard-000001.tar").stat() == kept
    capsys.readouterr()
    pack(pictures, out, workers=2, shard_samples=5)
    assert "already packed: 18 pictures" in capsys.readouterr().out


def test_validation_share_is_stratified_and_disjoint(pictures: Path, tmp_path: Path) -> None:
    pack(pictures, tmp_path / "out", val_fraction=0.25, workers=1)
    train, val = by_source(tmp_path / "out/train"), by_source(tmp_path / "out/val")
    assert not set(train) & set(val)
    assert Index.open(tmp_path / "out/train").counts == [6, 1, 6]
    assert Index.open(tmp_path / "out/val").counts == [2, 1, 2]


def test_given_splits_share_one_class_list(pictures: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for split in ("train", "valid", "test"):
        source.mkdir(exist_ok=True)
        os.symlink(pictures, source / split)
    pack(source, tmp_path / "out", workers=1)
    opened = [Index.open(tmp_path / "out" / split) for split in ("train", "val", "test")]
    assert [index.classes for index in opened] == [["Brüche", "rare", "猫"]] * 3
    with pytest.raises(ValueError, match="has valid/ already: leave out --val-fraction"):
        pack(source, tmp_path / "again", val_fraction=0.1)
    put(tmp_path / "more/train/a/0.png", picture(0))
    put(tmp_path / "more/train/b/0.png", picture(1))
    put(tmp_path / "more/val/c/0.png", picture(2))
    with pytest.raises(ValueError, match=r"val/c: a class that the training pictures do not have"):
        pack(tmp_path / "more", tmp_path / "again")


def test_classes_called_train_and_val_are_classes(tmp_path: Path) -> None:
    for name in ("bus", "train", "val"):
        put(tmp_path / "pictures" / name / "0.png", picture(0))
    pack(tmp_path / "pictures", tmp_path / "out", workers=1)
    assert Index.open(tmp_path / "out/train").classes == ["bus", "train", "val"]


def test_clear_errors(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="none: no such folder"):
        pack(tmp_path / "none", out)
    put(tmp_path / "empty/a/readme.txt", b"")
    with pytest.raises(ValueError, match=r"no pictures \(jpg, jpeg, png, webp\)"):
        pack(tmp_path / "empty", out)
    put(tmp_path / "single/a/0.png", picture(0))
    with pytest.raises(ValueError, match="a single class, 'a'"):
        pack(tmp_path / "single", out)
    put(tmp_path / "single/b/readme.txt", b"")
    with pytest.raises(ValueError, match="single/b: a class without pictures"):
        pack(tmp_path / "single", out)
    with pytest.raises(ValueError, match="val-fraction must be"):
        pack(pictures, out, val_fraction=1.5)
    assert not out.exists()
    put(out / "train/other.txt", b"")
    with pytest.raises(ValueError, match="holds other files"):
        pack(pictures, out)
    pack(pictures, tmp_path / "full", workers=1)
    put(pictures / "rare/2.png", picture(3))
    with pytest.raises(ValueError, match="holds other files"):
        pack(pictures, tmp_path / "full")


def test_names_files_that_are_no_pictures(pictures: Path, tmp_path: Path) -> None:
    put(pictures / "rare/empty.png", b"")
    put(pictures / "rare/animated.jpg", b"GIF89a" + bytes(50))
    with pytest.raises(
        ValueError, match=r"not pictures: .*animated\.jpg \(begins with b'GIF8'\); .*empty\.png \(empty\)"
    ):
        pack(pictures, tmp_path / "out", workers=1, shard_samples=4)
    assert not (tmp_path / "out/train/index.json").exists()
    assert not list((tmp_path / "out").rglob(".shard-*"))


def test_digits(tmp_path: Path) -> None:
    write_digits(tmp_path)
    assert len(list(tmp_path.glob("train/*/*.png"))) == 1442
    assert len(list(tmp_path.glob("val/*/*.png"))) == 355
    with Image.open(next(tmp_path.glob("val/3/*.png"))) as image:
        assert (image.mode, image.size, image.getextrema()) == ("L", (8, 8), (0, 255))
