"""From shard bytes to pixels. python -m pytest tests/vitdist/data/test_reader.py"""

import dataclasses
import errno
import io
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitdist.config import Data
from vitdist.data import transforms
from vitdist.data.index import Index, build
from vitdist.data.pack import pack
from vitdist.data.reader import Bad, DataFailed, Samples, through_webdataset
from vitdist.data.storage import Storage


def encoded(pixels: np.ndarray, form: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def noise(seed: int, height: int = 40, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


SETTINGS = Data(train="-", val="-")


@pytest.fixture
def shards(tmp_path: Path) -> Index:
    """24 samples of 2 classes in 5 shards."""
    for i in range(24):
        form = ("JPEG", "PNG", "WEBP")[i % 3]
        path = tmp_path / "pictures" / f"c{i % 2}" / f"{i}.{form.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(i), form))
    pack(tmp_path / "pictures", tmp_path / "out", workers=1, shard_samples=5)
    return Index.open(tmp_path / "out/train")


def damage(index: Index, row: int, at: int) -> None:
    """Flip a byte `at` bytes into a sample."""
    shard, start, _ = index.span(row)
    position = start + at
    with open(index.places[shard].url, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def read(samples: Samples, rows: list[int]) -> list[bytes | Bad]:
    """Picture files of `rows` as the reader gets them, in that order."""
    found = {
        place: picture if isinstance(picture, Bad) else bytes(picture) for place, picture in samples.pictures(rows)
    }
    return [found[place] for place in range(len(rows))]


def test_strict_path_gives_the_same_bytes(shards: Index) -> None:
    ids = np.random.default_rng(0).permutation(len(shards)).tolist()
    strict = list(through_webdataset(shards, ids))
    fast = read(Samples(shards, SETTINGS, 16, 0, training=False), ids)
    for i, (payload, label), picture in zip(ids, strict, fast, strict=True):
        assert payload == picture == shards.image(i)
        assert label == shards.labels[i]


def test_neighbours_are_read_in_one_call(shards: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    once = Storage.read_into
    monkeypatch.setattr(Storage, "read_into", lambda *args: calls.append(1) or once(*args))
    pictures = read(Samples(shards, SETTINGS, 16, 0, training=False), list(range(24)))
    assert len(calls) == len(shards.shards) == 5
    assert pictures == [shards.image(i) for i in range(24)]


def test_one_row_twice_in_a_batch(shards: Index) -> None:
    """Where classes are balanced, or a batch straddles epochs."""
    assert read(Samples(shards, SETTINGS, 16, 0, training=False), [3, 5, 3]) == [shards.image(i) for i in (3, 5, 3)]


def test_chunks_are_read_ahead_once(shards: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    expected: list[tuple[int, int, int]] = []
    monkeypatch.setattr(Storage, "expect", lambda self, *args: expected.append(args))
    samples = Samples(shards, SETTINGS, 16, 0, training=True, chunk=2)
    for rows in ([0, 8], [1, 9, 4]):  # rows 4 and 5 lie in two shards
        read(samples, rows)
    ends = [shards.span(last) for last in (1, 9)]
    assert expected == [
        (*shards.span(first)[:2], end[1] + end[2] - shards.span(first)[1])
        for first, end in zip((0, 8), ends, strict=True)
    ]


def test_D10_a_damaged_copy_is_read_again(shards: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = [True]
    once = Storage.read_into

    def flipping(self: Storage, shard: int, offset: int, view: memoryview) -> None:
        once(self, shard, offset, view)
        if damaged.pop():
            view[700] ^= 1
            damaged.append(False)

    monkeypatch.setattr(Storage, "read_into", flipping)
    assert read(Samples(shards, SETTINGS, 16, 0, training=True), [4]) == [shards.image(4)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_D10_what_a_disk_cannot_read_is_named_or_read_at_the_second_try(
    shards: Index, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, failing = os.pread, [True]

    def preadv(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    def pread(handle: int, size: int, offset: int) -> bytes:
        if failing[0]:
            raise OSError(number, os.strerror(number))
        return real(handle, size, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "pread", pread)
    samples = Samples(shards, SETTINGS, 16, 0, training=True)
    [bad] = [found for found in read(samples, [4]) if isinstance(found, Bad)]
    assert (bad.id, bad.reason, bad.shard) == (4, "unreadable", shards.shards[0].name)
    assert os.strerror(number) in bad.detail
    failing[0] = False
    assert read(samples, [4]) == [shards.image(4)]


def test_pixels_depend_on_seed_epoch_and_sample_only(shards: Index) -> None:
    samples = Samples(shards, SETTINGS, 16, 3, training=True)
    wanted = [(0, 5), (1, 5), (0, 9), (0, 5)]
    batch = samples.__getitems__(wanted)
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (4, 3, 16, 16))
    assert batch.ids.tolist() == [5, 5, 9, 5]
    assert batch.labels.tolist() == [int(shards.labels[i]) for i in (5, 5, 9, 5)]
    assert torch.equal(batch.images[0], batch.images[3])
    assert not torch.equal(batch.images[0], batch.images[1])
    alone = samples.__getitems__([(1, 5)])
    assert torch.equal(alone.images[0], batch.images[1])
    other_seed = Samples(shards, SETTINGS, 16, 4, training=True).__getitems__(wanted)
    assert not torch.equal(batch.images, other_seed.images)


def test_a_fault_of_an_augmentation_is_none_of_the_sample(shards: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would pass for a broken file, be replaced, and never be heard of."""

    def fails(*_: object) -> None:
        raise ValueError("bits must be between or equal to 1 and 8")

    samples = Samples(shards, SETTINGS.model_copy(update={"auto_augment": "3a"}), 16, 0, training=True)
    monkeypatch.setattr("vitdist.data.colour._policy", lambda *_: fails)
    with pytest.raises(ValueError, match="bits must be"):
        samples.__getitems__([(0, 1)])


def test_evaluation_changes_no_colours(shards: Index) -> None:
    changing = SETTINGS.model_copy(update={"auto_augment": "trivial", "colour_jitter": 0.5})
    plain, same = (Samples(shards, how, 16, 0, training=False).__getitems__([(0, 1)]) for how in (SETTINGS, changing))
    assert torch.equal(plain.images, same.images)


def test_D3_broken_samples_are_replaced_in_training(shards: Index) -> None:
    straight = Samples(shards, SETTINGS, 16, 0, training=True)
    wanted = [(0, i) for i in range(24)]
    before = straight.__getitems__(wanted)
    damage(shards, 7, 1536 + 40)
    batch = straight.__getitems__(wanted)
    again = Samples(shards, SETTINGS, 16, 0, training=True).__getitems__(wanted[7:8])
    (bad,) = batch.bad
    assert (bad.id, bad.shard, bad.key) == (7, shards.shards[shards.span(7)[0]].name, shards.key(7))
    assert (bad.reason, bad.detail) == ("changed", "changed since it was indexed (CRC)")
    assert shards.labels[int(again.ids[0])] == shards.labels[7]
    assert batch.ids[7] == again.ids[0] != 7
    assert batch.mask.all()
    assert torch.equal(batch.images[7], again.images[0])
    assert batch.labels[7] == int(shards.labels[int(batch.ids[7])])
    rest = torch.arange(24) != 7
    assert torch.equal(batch.images[rest], before.images[rest])


def test_D3_broken_samples_and_padding_are_masked_in_evaluation(shards: Index) -> None:
    damage(shards, 2, 0)  # in the tar header
    batch = Samples(shards, SETTINGS, 16, 0, training=False).__getitems__([(0, 1), (0, 2), (0, -1)])
    assert batch.mask.tolist() == [True, False, False]
    assert batch.ids.tolist() == [1, -1, -1]
    assert [(bad.id, bad.key) for bad in batch.bad] == [(2, shards.key(2))]
    # other values in memory first: what is not cleared would show them
    dirty = [np.full((1, 3, 16, 16), 255, np.uint8) for _ in range(64)]
    del dirty
    masked = [Samples(shards, SETTINGS, 16, 0, training=False).__getitems__([(0, 2), (0, -1)]) for _ in range(16)]
    assert not any(batch.images.any() for batch in masked)
    assert Samples(shards, SETTINGS, 16, 0, training=False).__getitems__([(0, -1)]).ids.tolist() == [-1]


def test_D4_a_missing_shard_is_said_and_a_broken_set_ends(shards: Index) -> None:
    name = shards.shards[0].name
    Path(shards.folder, name).unlink()
    batch = Samples(shards, SETTINGS, 16, 0, training=True).__getitems__([(0, 0)])
    assert batch.bad[0].reason == "unreadable"
    assert "No such file or directory" in batch.bad[0].detail
    for shard in shards.shards[1:]:
        os.truncate(Path(shards.folder, shard.name), 0)
    with pytest.raises(DataFailed, match="100 samples in a row are broken"):
        Samples(shards, SETTINGS, 16, 0, training=True).__getitems__([(0, 0)])


def test_D3_a_picture_that_unpacks_to_gigabytes_is_bad(tmp_path: Path) -> None:
    """30,000 x 30,000 pixels in 110 kB."""
    folder = tmp_path / "pictures" / "c0"
    folder.mkdir(parents=True)
    for number in range(2):
        (folder / f"{number}.png").write_bytes(encoded(noise(number)))
    row = zlib.compressobj(9)
    rows = b"".join([*(row.compress(bytes(1 + 3750)) for _ in range(30_000)), row.flush()])
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in (("a.cls", b"0"), ("a.png", bomb), ("b.cls", b"0"), ("b.png", encoded(noise(1)))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    build(tmp_path)
    batch = Samples(Index.open(tmp_path), SETTINGS, 16, 0, training=True).__getitems__([(0, 0)])
    assert [(bad.key, bad.reason) for bad in batch.bad] == [("a", "undecodable")]
    assert "decompression bomb" in batch.bad[0].detail
    assert batch.ids.tolist() == [1]


def test_D3_an_undecodable_picture_is_bad(tmp_path: Path) -> None:
    for i in range(6):
        path = tmp_path / "pictures" / f"c{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = encoded(noise(i, 200, 200), "JPEG")
        path.write_bytes(content[: len(content) // 3] if i == 4 else content)
    pack(tmp_path / "pictures", tmp_path / "out", workers=1)
    index = Index.open(tmp_path / "out/train")
    batch = Samples(index, SETTINGS, 16, 0, training=False).__getitems__([(0, i) for i in range(6)])
    (bad,) = batch.bad
    assert index.source(bad.id) == "c0/4.jpg"
    assert bad.reason == "undecodable"
    assert "not decodable (OSError" in bad.detail


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_D3_every_mode_becomes_rgb(mode: str) -> None:
    grey = np.full((20, 20, 3), 255, np.uint8)
    form = {"CMYK": "JPEG"}.get(mode, "PNG")
    pixels = transforms.evaluation_pixels(encoded(grey, form, mode), SETTINGS, 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels.min() >= 253


def test_sixteen_bit_grey_keeps_its_contrast() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(np.array([[1000, 60000]], np.uint16), 8, 0).repeat(4, 1)).save(buffer, "PNG")
    pixels = transforms.evaluation_pixels(buffer.getvalue(), SETTINGS.model_copy(update={"eval_crop": 1.0}), 8)
    assert (int(pixels[0, 0, 0]), int(pixels[0, 0, 7])) == (1000 >> 8, 60000 >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    from PIL import ImageOps

    smooth = np.asarray(Image.fromarray(noise(0, 3, 4)).resize((640, 480), Image.Resampling.BICUBIC))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(smooth, "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    box = (upright.width * 0.1, upright.height * 0.2, upright.width * 0.9, upright.height * 0.7)
    expected = np.asarray(upright.resize((32, 32), Image.Resampling.BILINEAR, box=box)).astype(int)
    got = transforms.cut(content, lambda w, h: (w * 0.1, h * 0.2, w * 0.9, h * 0.7), 32)
    got = got.permute(1, 2, 0).numpy().astype(int)
    assert np.abs(got - expected).max() <= 6  # the decoder has halved the picture: not the same bits


def test_crops_stay_inside_and_cover_the_range() -> None:
    settings = Data(train="-", val="-", crop_scale=(0.25, 1.0))
    for width, height in ((8, 8), (500, 375), (3, 400), (1, 1)):
        areas = []
        for seed in range(300):
            box = transforms.training_crop(settings, np.random.default_rng(seed))(width, height)
            left, top, right, bottom = box
            assert 0 <= left < right <= width + 1e-9
            assert 0 <= top < bottom <= height + 1e-9
            assert 0.74 < (right - left) / (bottom - top) < 1.34
            areas.append((right - left) * (bottom - top) / width / height)
        if width > 3:
            assert min(areas) < 0.3
            assert max(areas) > 0.9


def test_evaluation_crop_is_central() -> None:
    left, top, right, bottom = transforms.evaluation_crop(SETTINGS, 224)(512, 256)
    assert (left, top, right, bottom) == (144, 16, 368, 240)


def test_normalise() -> None:
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    out = transforms.normalise(images, (0.5, 0.5, 0.1), (0.5, 0.25, 0.1))
    assert torch.allclose(out[0, :, 0, 0], torch.tensor([-1.0, 2.0, 1.0]))
    assert out.is_contiguous()
    assert transforms.normalise(images, (0.5,) * 3, (0.5,) * 3, torch.bfloat16).dtype == torch.bfloat16


def test_D10_a_server_that_does_not_answer_ends_the_run(shards: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was tried for a minute: other samples instead would be another training, and a minute each."""
    places = [place._replace(url=f"memory://gone/{place.url}") for place in shards.places]
    calls: list[int] = []

    def refuse(*_: object) -> None:
        calls.append(1)
        raise OSError("http://host/a.tar: no answer in 9 tries")

    monkeypatch.setattr(Storage, "read_into", refuse)
    samples = Samples(dataclasses.replace(shards, places=places), SETTINGS, 16, 0, training=True)
    with pytest.raises(DataFailed, match="no answer in 9 tries"):
        samples.__getitems__([(0, i) for i in range(24)])
    assert len(calls) == 1


def test_a_rare_class_is_replaced_by_itself(tmp_path: Path) -> None:
    """2 of 300 samples: a draw over all would hardly find the other."""
    for i in range(300):
        path = tmp_path / "pictures" / ("rare" if i < 2 else "common") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(i, 8, 8)))
    pack(tmp_path / "pictures", tmp_path / "out", workers=1)
    index = Index.open(tmp_path / "out/train")
    rare = np.flatnonzero(index.labels == index.classes.index("rare")).tolist()
    damage(index, rare[0], 600)
    for epoch in range(5):
        batch = Samples(index, SETTINGS, 8, 0, training=True).__getitems__([(epoch, rare[0])])
        assert batch.ids.tolist() == [rare[1]]
