"""Decoding on the device; here on the CPU, through the same library and calls.

python -m pytest tests/vitdist/data/test_device_decode.py
"""

import functools
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitdist.config import Batch, Config, Data, Model, Scratch, Train
from vitdist.data import device_decode
from vitdist.data.index import Index
from vitdist.data.loader import open_training
from vitdist.data.pack import pack
from vitdist.data.reader import MicroBatch, Samples

CPU = torch.device("cpu")
SIZE = 32


def encoded(number: int, form: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    smooth = Image.fromarray(np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    smooth.resize((120, 90), Image.Resampling.BICUBIC).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """12 plain JPEGs, a grey one, a PNG, one of CMYK, one on its side, one cut off."""
    folder = tmp_path_factory.mktemp("device")
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(i, quality=95) for i in range(12)]
    files += [encoded(12, mode="L"), encoded(13, "PNG"), encoded(14, mode="CMYK"), encoded(15, exif=exif)]
    files += [encoded(16)[:-300]]
    for i, content in enumerate(files):
        path = folder / "pictures" / f"c{i % 2}" / f"{i:02d}.{'png' if i == 13 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    pack(folder / "pictures", folder / "out", workers=1)
    return Index.open(folder / "out/train")


def settings(index: Index, decode: str) -> Data:
    return Data(train=str(index.folder), val="-", workers=0, decode=decode, max_bad=1.0)


def on_device(batch: MicroBatch) -> torch.Tensor:
    assert batch.encoded
    return device_decode.pixels(batch.encoded, batch.images, CPU, SIZE)


def test_the_same_crops_in_nearly_the_same_pixels(index: Index) -> None:
    rows = {Path(index.source(i)).stem: i for i in range(len(index))}
    wanted = [(0, rows[f"{i:02d}"]) for i in range(17)]
    there, here = (
        Samples(index, settings(index, decode), SIZE, 0, training=True).__getitems__(wanted)
        for decode in ("gpu", "cpu")
    )
    assert there.encoded
    assert there.ids.tolist() == here.ids.tolist()
    assert [bad.id for bad in there.bad] == [rows["16"]] == [bad.id for bad in here.bad]
    left_to_the_device = there.encoded.sizes > 0
    assert left_to_the_device[:16].tolist() == [True] * 13 + [False] * 3
    apart = (on_device(there).int() - here.images.int()).abs().flatten(1)
    assert apart[left_to_the_device].max() <= 24  # the other lets the decoder halve a large crop
    assert apart[left_to_the_device].float().mean() < 2
    assert not apart[~left_to_the_device].any()


def test_what_the_device_cannot_decode_is_replaced(tmp_path: Path) -> None:
    """A JPEG without its quantisation tables passes the look at its header."""
    for i in range(4):
        content = bytearray(encoded(i, quality=95))
        if i == 2:  # the only one of its class: another class has to stand in, with its own label
            table = content.index(b"\xff\xdb")
            content[table : table + 2] = b"\xff\xfe"  # a comment from here on
        path = tmp_path / "pictures" / ("alone" if i == 2 else f"c{i % 2}") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    pack(tmp_path / "pictures", tmp_path / "out", workers=1)
    index = Index.open(tmp_path / "out/train")
    rows = {index.source(i): i for i in range(4)}
    samples = Samples(index, settings(index, "gpu"), SIZE, 0, training=True)
    batch = samples.__getitems__([(0, rows["alone/2.jpg"]), (0, rows["c1/1.jpg"])])
    assert batch.encoded
    with pytest.raises(RuntimeError):
        on_device(batch)

    instead = functools.partial(samples.instead, batch)
    images = device_decode.pixels(batch.encoded, batch.images, CPU, SIZE, instead)
    assert [(bad.id, bad.reason) for bad in batch.bad] == [(rows["alone/2.jpg"], "undecodable")]
    on_the_cpu = Samples(index, settings(index, "cpu"), SIZE, 0, training=True)
    assert torch.equal(images[0], on_the_cpu.__getitems__([(0, int(batch.ids[0]))]).images[0])
    assert batch.labels.tolist() == index.labels[batch.ids.numpy()].tolist()


def test_ranks_and_processes_change_nothing(index: Index) -> None:
    def batches(world: int, workers: int) -> torch.Tensor:
        config = Config(
            data=settings(index, "gpu").model_copy(update={"workers": workers}),
            model=Model(scratch=Scratch(patch_size=8), image_size=SIZE),
            train=Train(global_batch=12, epochs=1),
        )
        batch = Batch(global_batch=12, micro_batch=12 // world, accumulation=1, world=world)
        ranks = [list(itertools.islice(open_training(config, 12).batches(batch, r, 0, 1), 3)) for r in range(world)]
        return torch.cat([on_device(ranks[rank][step]) for step in range(3) for rank in range(world)])

    straight = batches(1, 0)
    assert torch.equal(batches(3, 0), straight)
    assert torch.equal(batches(2, 2), straight)


def test_without_torchcodec_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    device_decode.check()
    monkeypatch.setitem(__import__("sys").modules, "torchcodec.decoders", None)
    with pytest.raises(ValueError, match=r"pip install torchcodec, or data\.decode=cpu"):
        device_decode.check()
