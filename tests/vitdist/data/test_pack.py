"""Packing folders of pictures. python -m pytest tests/vitdist/data/test_pack.py"""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from vitdist.data import index as index_
from vitdist.data import made, parallel
from vitdist.data.index import GROUP, Index
from vitdist.data.pack import pack, write_digits
from vitdist.data.recode import Recipe, recode


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
    for path in (out / "train").glob("*"):
        if not path.name.startswith((".", "shard-")) or path.name == "shard-000000.tar":
            path.unlink()
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
    with pytest.raises(ValueError, match=r"no pictures \(jpg, jpeg, png, webp, bmp, tif, tiff\)"):
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


def test_D3_files_that_are_no_pictures_are_named(pictures: Path, tmp_path: Path) -> None:
    put(pictures / "rare/empty.png", b"")
    put(pictures / "rare/animated.jpg", b"GIF89a" + bytes(50))
    with pytest.raises(
        ValueError, match=r"not pictures: .*animated\.jpg \(begins with b'GIF8'\); .*empty\.png \(empty\)"
    ):
        pack(pictures, tmp_path / "out", workers=1, shard_samples=4)
    assert not (tmp_path / "out").exists()
    for name in ("empty.png", "animated.jpg"):
        (pictures / "rare" / name).unlink()
    pack(pictures, tmp_path / "out", workers=1)


def members(folder: Path) -> list[dict[str, bytes]]:
    """Of each sample: extension -> content, with the source's name under 'name'."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return list(samples.values())


# ---- every kind of source -------------------------------------------------------------------------


def as_folder(pictures: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    put(pictures / "rare/scan.tif", picture(7, "TIFF"))
    put(pictures / "rare/old.BMP", picture(8, "BMP"))
    return pictures, {"group_by": r"name:([^/]*)\.[^.]*$"}


def as_table(pictures: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    pictures, _ = as_folder(pictures, tmp_path)
    files = sorted(
        p.relative_to(pictures)
        for p in pictures.rglob("*")
        if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp")
        and not any(part.startswith(".") for part in p.relative_to(pictures).parts)
    )
    rows = [f"{path},{path.parts[0]},p{i // 2}" for i, path in enumerate(files)]
    put(tmp_path / "table.csv", "\n".join(["path,label,patient", *rows]).encode())
    return tmp_path / "table.csv", {"group_by": "patient", "root": pictures}


def as_hub(pictures: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """20 rows in 2 files, row groups of 3; as `datasets` writes them."""
    label = {"_type": "ClassLabel", "names": ["Katze", "Brüche"]}
    about = json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})
    for number in range(2):
        forms = ["PNG", "JPEG", "TIFF", "WEBP", "BMP"] * 2
        rows = {
            "image": [{"bytes": picture(number * 10 + i, form), "path": None} for i, form in enumerate(forms)],
            "label": [(i // 2 + number) % 2 for i in range(10)],
            "patient": [f"p{i // 2}" for i in range(10)],
        }
        path = tmp_path / "hub/data" / f"train-{number:05}-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table(rows).replace_schema_metadata({b"huggingface": about.encode()})
        parquet.write_table(table, path, row_group_size=3)
    return tmp_path / "hub", {"group_by": "patient"}


def as_saved(pictures: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    as_hub(pictures, tmp_path)
    table = pa.concat_tables([parquet.read_table(p) for p in sorted((tmp_path / "hub/data").iterdir())])
    (tmp_path / "saved").mkdir()
    with pa.ipc.new_stream(str(tmp_path / "saved/data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    (tmp_path / "saved/state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    return tmp_path / "saved", {"group_by": "patient"}


KINDS = [as_folder, as_table, as_hub, as_saved]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few pictures make several."""
    monkeypatch.setattr(made, "_FILES", 3)
    monkeypatch.setattr(made, "_BYTES", 1500)


@pytest.mark.parametrize("resize", [None, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_any_source_gives_the_same_bytes_for_any_number_of_workers(
    pictures: Path,
    tmp_path: Path,
    small_batches: None,
    kind: Callable[[Path, Path], tuple[Path, dict[str, Any]]],
    resize: int | None,
) -> None:
    source, options = kind(pictures, tmp_path)
    for out, workers in (("one", 1), ("three", 3)):
        pack(source, tmp_path / out, workers=workers, val_fraction=0.25, resize=resize, shard_bytes=20_000, **options)
    first = contents(tmp_path / "one")
    assert first == contents(tmp_path / "three")
    assert "train/shard-000001.tar" in first
    assert not list((tmp_path / "one").glob(".made-*"))
    assert all(len(content) <= 20_480 for name, content in first.items() if name.endswith(".tar"))
    parts = [members(tmp_path / "one" / split) for split in ("train", "val")]
    assert sum(map(len, parts)) == 20
    groups = [{sample[GROUP] for sample in part} for part in parts]
    assert not groups[0] & groups[1]
    for sample in [*parts[0], *parts[1]]:
        form = next(form for form in ("jpg", "png", "webp") if form in sample)
        with Image.open(io.BytesIO(sample[form])) as image:
            assert image.size == ((8, 10) if resize else (10, 12))
            assert image.format == ("JPEG" if resize else {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[form])


def test_rows_keep_their_bytes_and_labels(pictures: Path, tmp_path: Path, small_batches: None) -> None:
    pack(as_hub(pictures, tmp_path)[0], tmp_path / "out", workers=2, progress=False)
    packed = by_source(tmp_path / "out/train")
    assert len(packed) == 20
    for number in range(2):
        for i, form in enumerate(["PNG", "JPEG", "TIFF", "WEBP", "BMP"] * 2):
            name, content = packed[f"data/train-{number:05}-of-00002.parquet/{i}"]
            assert name == ["Katze", "Brüche"][(i // 2 + number) % 2]
            assert content == recode(picture(number * 10 + i, form), Recipe())[1]


def test_groups_are_kept_only_if_known(pictures: Path, tmp_path: Path) -> None:
    pack(*(as_table(pictures, tmp_path)[0], tmp_path / "out"), root=pictures, workers=1)
    assert {frozenset(sample) - {"jpg", "png", "webp"} for sample in members(tmp_path / "out/train")} == {
        frozenset({"cls", "path"})
    }


def test_says_how_the_split_came_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(8):
        put(tmp_path / "pictures/a" / f"p{i} 0.png", picture(i))
    for i in range(6):
        put(tmp_path / "pictures/b" / f"q{i // 3} {i}.png", picture(10 + i))
    pack(tmp_path / "pictures", tmp_path / "out", val_fraction=0.25, group_by=r"name:/(\w+) ", workers=1)
    said = capsys.readouterr().out
    assert "10 groups: 7 for training, 3 for validation" in said
    assert "validation share not near 0.25, for want of groups to choose from: b 3 of 6\n" in said


def test_a_test_set_without_validation(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(pictures, tmp_path / "source/train")
    shutil.copytree(pictures, tmp_path / "source/test")
    pack(tmp_path / "source", tmp_path / "out", workers=1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train", "val", ".pack.lock"}
    assert "test/ is packed as val" in capsys.readouterr().out
    pack(tmp_path / "source", tmp_path / "three", workers=1, val_fraction=0.2)
    assert [len(Index.open(tmp_path / "three" / name)) for name in ("train", "val", "test")] == [13, 5, 18]


# ---- what becomes of a picture --------------------------------------------------------------------


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def smooth(mode: str = "RGB", size: tuple[int, int] = (60, 40)) -> Image.Image:
    """A picture that JPEG keeps well: ramps, different in every channel."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8)).convert(mode)


def opened(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def difference(a: Image.Image, b: Image.Image) -> float:
    assert a.size == b.size
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_tiff_becomes_png_without_loss(mode: str) -> None:
    image = smooth(mode)
    kind, content = recode(encoded(image, "TIFF"), Recipe())
    kept = opened(content)
    assert (kind, kept.mode) == ("png", "RGB" if mode == "CMYK" else mode)
    assert (
        difference(
            kept.convert("RGBA"), image.convert("RGB").convert("RGBA") if mode == "CMYK" else image.convert("RGBA")
        )
        == 0
    )
    assert recode(encoded(smooth(), "BMP"), Recipe()) == ("png", encoded(smooth(), "PNG"))


def test_grey_of_16_bits() -> None:
    pixels = np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(np.uint16)
    kept = opened(recode(encoded(Image.fromarray(pixels), "TIFF"), Recipe())[1])
    assert kept.mode == "I;16"
    assert (np.asarray(kept) == pixels).all()
    for form in ("TIFF", "PNG"):
        small = opened(recode(encoded(Image.fromarray(pixels), form), Recipe(quality=95))[1])
        assert small.mode == "L"
        assert np.abs(np.asarray(small, int) - (pixels >> 8)).max() <= 3
    for values, reason in ((pixels.astype(np.float32), "floating-point"), (pixels.astype(np.int32) * 99, "scale them")):
        with pytest.raises(ValueError, match=reason):
            recode(encoded(Image.fromarray(values), "TIFF"), Recipe())


@pytest.mark.parametrize(
    ("mode", "form"), [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "WEBP"), ("LA", "PNG")]
)
def test_resized_in_colour_or_grey(mode: str, form: str) -> None:
    kind, content = recode(encoded(smooth(mode), form), Recipe(resize=20))
    small = opened(content)
    assert (kind, small.size) == ("jpg", (30, 20))
    assert small.mode == ("L" if mode.startswith("L") else "RGB")
    exact = opened(encoded(smooth(mode), form)).convert(small.mode).resize((30, 20), Image.Resampling.LANCZOS)
    assert difference(small, exact) < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_upright_by_exif(orientation: int) -> None:
    upright = smooth(size=(300, 200))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of Image.Transpose, all but 6 and 8 undo themselves
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("JPEG", "PNG", "TIFF", "WEBP"):
        small = opened(recode(encoded(stored, form, exif=exif), Recipe(resize=20))[1])
        assert difference(small, upright.resize((30, 20), Image.Resampling.LANCZOS)) < 12
        assert 0x0112 not in small.getexif()
    lossless = opened(recode(encoded(stored, "TIFF", exif=exif), Recipe())[1])
    assert difference(lossless, upright) == 0
    assert 0x0112 not in lossless.getexif()


def test_small_jpegs_keep_their_bytes_and_nothing_is_enlarged() -> None:
    small = encoded(smooth(), "JPEG")
    assert recode(small, Recipe(resize=40)) == ("jpg", small)
    assert recode(small, Recipe(resize=40, quality=95))[1] != small
    assert opened(recode(encoded(smooth(), "PNG"), Recipe(resize=400))[1]).size == (60, 40)
    assert opened(recode(encoded(smooth(size=(900, 2)), "PNG"), Recipe(resize=1))[1]).size == (450, 1)
    sizes = [len(recode(small, Recipe(quality=quality))[1]) for quality in (50, 80, 95)]
    assert sizes == sorted(sizes)
    assert recode(small, Recipe(resize=20)) == recode(small, Recipe(resize=20, quality=95))
    with pytest.raises(ValueError, match=r"not decodable: .*truncated"):
        recode(encoded(picture_of_noise(), "JPEG")[:2000], Recipe(resize=20))


def picture_of_noise(size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def test_says_when_resized_pictures_grow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        put(tmp_path / "pictures" / name / "0.jpg", encoded(picture_of_noise(), "JPEG", quality=20))
    pack(tmp_path / "pictures", tmp_path / "out", workers=1, resize=60)
    assert "the pictures grew from 0.0 to 0.0 MB: a lower --quality makes them smaller" in capsys.readouterr().out
    pack(tmp_path / "pictures", tmp_path / "small", workers=1, resize=60, quality=10)
    assert "grew" not in capsys.readouterr().out


def test_pages_and_misnamed_pictures(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = [smooth(), smooth().rotate(180)]
    put(pictures / "rare/pages.tiff", encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    put(pictures / "rare/really a tiff.jpg", encoded(smooth(), "TIFF"))
    pack(pictures, tmp_path / "out", workers=1)
    assert "1 TIFF files have several pages: the first was taken" in capsys.readouterr().out
    packed = by_source(tmp_path / "out/train")
    for name in ("rare/pages.tiff", "rare/really a tiff.jpg"):
        assert difference(opened(packed[name][1]), pages[0]) == 0


# ---- refusals and interruptions -------------------------------------------------------------------


def test_arguments_that_are_refused(pictures: Path, tmp_path: Path) -> None:
    put(tmp_path / "file", b"")
    put(tmp_path / "t.csv", b"path,label,split\na.png,x,train\nb.png,y,train\nc.png,x,val\n")
    for name in "abc":
        put(tmp_path / f"{name}.png", picture(0))
    for source, options, reason in (
        (pictures, {"resize": 0}, "--resize must be at least 1 pixel, not 0"),
        (pictures, {"quality": 101}, "--quality must be 1 to 100, not 101"),
        (pictures, {"out": pictures / "shards"}, "shards lies in .*pictures: pack into a folder beside it"),
        (pictures, {"out": tmp_path / "file"}, "file is a file: name a folder"),
        (
            tmp_path / "t.csv",
            {"val_fraction": 0.1},
            "has val in column 'split' already: leave out --val-fraction, or split anew with --split-column none",
        ),
    ):
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=reason):
            pack(source, **{"out": tmp_path / "out", **options})  # type: ignore[arg-type]
        assert contents(tmp_path) == before
        assert not (tmp_path / "out").exists()


def test_rows_that_are_no_pictures(tmp_path: Path) -> None:
    images = [{"bytes": picture(0), "path": "0"}, {"bytes": b"text", "path": "1"}, None, {"bytes": None, "path": "/a"}]
    parquet.write_table(pa.table({"image": images, "label": ["a", "b", "a", "b"]}), tmp_path / "t.parquet")
    reason = r"t\.parquet row 2 \(begins with b'text'\); .*row 3 \(no bytes in column 'image'\); .*row 4 \(no bytes"
    with pytest.raises(ValueError, match=reason):
        pack(tmp_path / "t.parquet", tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_other_arguments_are_another_data_set(pictures: Path, tmp_path: Path) -> None:
    pack(pictures, tmp_path / "out", workers=1, resize=8)
    for options in ({"resize": 9}, {"quality": 90, "resize": 8}, {}, {"resize": 8, "group_by": "name:(.)"}):
        with pytest.raises(ValueError, match=r"train holds other files \(of other pictures or arguments\)"):
            pack(pictures, tmp_path / "out", workers=1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("fails_at", range(1, 9))
def test_a_full_disk(
    pictures: Path, tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """Wherever it strikes, all is told in one line, nothing half-written stays, and the same command goes on."""
    source, out = as_folder(pictures, tmp_path)[0], tmp_path / "out"

    def fsync(file: int) -> None:
        counter.write(b".")
        if counter.tell() == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    with open(tmp_path / "counter", "ab", buffering=0) as counter, monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(
            ValueError, match=r"^no space left for .* \([0-9,]+ MB are free without it\): make room, then the same"
        ):
            pack(source, out, workers=1, shard_samples=7)
    assert not [
        p for p in out.rglob(".*") if p.name.startswith((".shard-", "..pack")) or (".made" in p.name and p.is_file())
    ]
    pack(source, out, workers=1, shard_samples=7)
    pack(source, tmp_path / "whole", workers=1, shard_samples=7)
    assert contents(out) == contents(tmp_path / "whole")


def test_too_little_space_is_told_before_the_start(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in pictures.rglob("*.*"))
    for free in (size - 2000, size + 2000):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(0, 0, free))  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"out: 0 MB are needed and 0 MB are free: make room, or pack elsewhere"):
            pack(pictures, tmp_path / "out", workers=1)
    assert not list((tmp_path / "out").rglob("*.tar"))
    # Rows lie on the disk twice while they are packed: known before the first is read.
    source, _ = as_hub(pictures, tmp_path)
    free = sum(path.stat().st_size for path in source.rglob("*.parquet")) + 2000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="MB are needed"):
        pack(source, tmp_path / "rows", workers=1)
    assert not (tmp_path / "rows").exists()


COMMAND = "import sys; from vitdist.data.pack import pack; pack(sys.argv[1], sys.argv[2], shard_samples=2, workers=2)"


def test_a_real_full_disk(pictures: Path, tmp_path: Path) -> None:
    """On a tmpfs of 1 MB, in a user's own mount namespace."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    for i in range(60):
        put(pictures / "rare" / f"noise {i}.png", encoded(picture_of_noise(100), "PNG"))
    out = tmp_path / "disk"
    out.mkdir()
    command = COMMAND.replace("shard_samples=2", "quality=100")
    script = 'mount -t tmpfs -o size=1m tmpfs "$3" && "$0" -c "$1" "$2" "$3/out"; code=$?; find "$3"; exit $code'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, sys.executable, command, str(pictures), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ValueError: no space left for" in done.stderr
    assert not [line for line in done.stdout.splitlines() if "/.0" in line or ".shard" in line]


def test_two_packs_into_one_folder(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(out / ".pack.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"another pack writes to .*out: wait for it, or pack into another folder"):
            pack(pictures, out, workers=1)
        other.kill()
    pack(pictures, out, workers=1)


def test_a_killed_pack_goes_on(pictures: Path, tmp_path: Path) -> None:
    for i in range(400):
        put(pictures / "rare" / f"more {i}.png", picture(i))
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", COMMAND, str(pictures), str(out)]) as process:
        end = time.monotonic() + 60
        while not (shards := list(out.glob("train/shard-*.tar"))):
            assert process.poll() is None
            assert time.monotonic() < end
        process.send_signal(signal.SIGKILL)
    assert not (out / "train/index.json").exists()
    kept = {path: path.stat() for path in shards}
    pack(pictures, out, workers=2, shard_samples=2)
    pack(pictures, tmp_path / "whole", workers=2, shard_samples=2)
    assert contents(out) == contents(tmp_path / "whole")
    assert {path: path.stat() for path in shards} == kept


def test_a_killed_worker(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "advance", lambda number=1: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ValueError, match="a packing process was killed, most often for want of memory"):
        pack(pictures, tmp_path / "out", workers=1)


def test_made_pictures_are_made_once(
    pictures: Path, tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = as_hub(pictures, tmp_path)
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(index_, "write", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack(source, out, workers=1, resize=8, val_fraction=0.2)
    kept = {path: path.stat() for path in out.glob(".made-*/*")}
    assert Counter(path.suffix for path in kept) == {"": len(kept) // 2, ".npy": len(kept) // 2}
    assert len(kept) > 6
    next(path for path in kept if path.suffix == ".npy").unlink()
    remade: list[int] = []
    make = parallel.each
    monkeypatch.setattr(
        parallel, "each", lambda work, items, *a, **k: remade.append(len(items)) or make(work, items, *a, **k)
    )
    pack(source, out, workers=1, resize=8, val_fraction=0.2)
    assert remade[0] == 1
    pack(source, tmp_path / "whole", workers=1, resize=8, val_fraction=0.2)
    assert contents(out) == contents(tmp_path / "whole")


def test_digits(tmp_path: Path) -> None:
    write_digits(tmp_path)
    assert len(list(tmp_path.glob("train/*/*.png"))) == 1442
    assert len(list(tmp_path.glob("val/*/*.png"))) == 355
    with Image.open(next(tmp_path.glob("val/3/*.png"))) as image:
        assert (image.mode, image.size, image.getextrema()) == ("L", (8, 8), (0, 255))
