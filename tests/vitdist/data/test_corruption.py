"""Damage of every kind: never a silent loss, never another label, never a hang.

python -m pytest tests/vitdist/data/test_corruption.py      # 2,000 random cases in some 15 s
"""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from vitdist.config import Data
from vitdist.data.index import Index, build, scan
from vitdist.data.reader import MicroBatch, Samples

SAMPLES, SHARDS = 4, 2
CASES = 2000
SETTINGS = Data(train="-", val="-", eval_crop=1.0)


def write(path: Path, first: int, labels: list[int]) -> None:
    """A shard of small pictures, each of one colour that tells its number."""
    with open(path, "wb") as file:
        writer = TarWriter(file, encoder=False, mtime=0)
        for number, label in enumerate(labels, first):
            buffer = io.BytesIO()
            Image.new("RGB", (9, 9), (number * 20, 100, 255 - number * 20)).save(buffer, "PNG")
            writer.write({"__key__": f"{number:05d}", "png": buffer.getvalue(), "cls": str(label).encode()})
        writer.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of the same size, 4 samples each."""
    folder = tmp_path_factory.mktemp("original")
    for shard in range(SHARDS):
        first = shard * SAMPLES
        write(folder / f"{shard}.tar", first, [(first + i) % 3 for i in range(SAMPLES)])
    build(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


@pytest.fixture(scope="module")
def expected(original: Path) -> MicroBatch:
    return everything(Index.open(original))


def everything(index: Index, training: bool = False, rows: range = range(SAMPLES * SHARDS)) -> MicroBatch:
    samples = Samples(index, SETTINGS, 8, 0, training)
    return samples.__getitems__([(0, row) for row in rows])


def all_right_or_named(batch: MicroBatch, expected: MicroBatch, rows: range = range(SAMPLES * SHARDS)) -> set[int]:
    """Every sample is as it was, or masked and named; returns the named ones."""
    broken = {bad.id for bad in batch.bad}
    for slot, row in enumerate(rows):
        assert bool(batch.mask[slot]) == (row not in broken)
        if row not in broken:
            assert torch.equal(batch.images[slot], expected.images[row])
            assert batch.labels[slot] == expected.labels[row]
    return broken


def indexed_anew(shard: Path, before: str) -> None:
    """Refused, or as many samples under another identity: a run on the old one does not go on with it."""
    found, refusal = None, ""
    try:
        found = scan(shard)
    except ValueError as error:
        refusal = str(error)
    if found is None:
        assert refusal.startswith(str(shard))
        return
    assert found.shard.samples == SAMPLES
    assert found.shard.sha256 != before


def damaged(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """One random damage: a byte, a bit, a cut, a block of zeros, a block from elsewhere, bytes lost or put in."""
    kind = str(
        rng.choice(
            ["byte", "bit", "cut", "zeros", "moved", "lost", "more"], p=[0.35, 0.25, 0.2, 0.05, 0.05, 0.05, 0.05]
        )
    )
    at, end = int(rng.integers(len(content))), int(rng.integers(1, 1500))
    if kind == "byte":
        return content[:at] + bytes([(content[at] + int(rng.integers(1, 256))) % 256]) + content[at + 1 :], kind
    if kind == "bit":
        return content[:at] + bytes([content[at] ^ (1 << int(rng.integers(8)))]) + content[at + 1 :], kind
    if kind == "cut":
        return content[:at], kind
    if kind == "zeros":
        return content[:at] + bytes(len(content[at : at + end])) + content[at + end :], kind
    if kind == "moved":
        start = int(rng.integers(len(content)))
        piece = content[start : start + len(content[at : at + end])].ljust(len(content[at : at + end]), b"\0")
        return content[:at] + piece + content[at + end :], kind
    if kind == "lost":
        return content[:at] + content[at + end :], kind
    return content[:at] + rng.bytes(end) + content[at:], kind


def test_D1_D2_two_thousand_damages(folder: Path, original: Path, expected: MicroBatch) -> None:
    index, rng = Index.open(folder), np.random.default_rng(0)
    seen: dict[str, int] = {}
    for _ in range(CASES):
        number = int(rng.integers(SHARDS))
        shard, content = folder / f"{number}.tar", (original / f"{number}.tar").read_bytes()
        changed, kind = damaged(content, rng)
        shard.write_bytes(changed)
        differs = {row for row in range(SAMPLES * SHARDS) if span_differs(index, row, number, content, changed)}
        rows = range(number * SAMPLES, (number + 1) * SAMPLES)  # of the damaged shard: the other is not touched
        assert all_right_or_named(everything(index, rows=rows), expected, rows) == differs
        if changed != content:
            indexed_anew(shard, index.shards[number].sha256)
            seen[kind] = seen.get(kind, 0) + bool(differs)
        shard.write_bytes(content)
    assert min(seen.values()) > 20
    assert len(seen) == 7


def span_differs(index: Index, row: int, damaged_shard: int, before: bytes, after: bytes) -> bool:
    shard, offset, size = index.span(row)
    return shard == damaged_shard and before[offset : offset + size] != after[offset : offset + size]


@pytest.mark.parametrize(
    ("how", "refused", "named"),
    [
        ("missing", r"1\.tar is missing", {4, 5, 6, 7}),
        ("empty", r"1\.tar has 0 bytes", {4, 5, 6, 7}),
        ("swapped", None, set(range(8))),
        ("doubled", None, {4, 5, 6, 7}),
        ("one more", r"2\.tar is not in the index", set()),
    ],
)
def test_D4_D9_whole_shards(folder: Path, expected: MicroBatch, how: str, refused: str | None, named: set[int]) -> None:
    """What a look at the folder cannot tell, the CRC of each sample does."""
    index, first, second = Index.open(folder), folder / "0.tar", folder / "1.tar"
    if how == "missing":
        second.unlink()
    elif how == "empty":
        os.truncate(second, 0)
    elif how == "swapped":
        first.rename(folder / "kept")
        second.rename(first)
        (folder / "kept").rename(second)
    elif how == "doubled":
        shutil.copy(first, second)
    else:
        shutil.copy(first, folder / "2.tar")
    if refused:
        with pytest.raises(ValueError, match=refused):
            Index.open(folder)
    assert all_right_or_named(everything(index), expected) == named
    if how in ("doubled", "one more"):
        with pytest.raises(ValueError, match="are the same shard"):
            build(folder)


def test_D2_D3_training_goes_on_with_others_of_the_class(folder: Path, expected: MicroBatch) -> None:
    index = Index.open(folder)
    _, offset, size = index.span(5)
    content = bytearray((folder / "1.tar").read_bytes())
    content[offset + size // 2] ^= 1
    (folder / "1.tar").write_bytes(content)
    batch = everything(index, training=True)
    assert [bad.id for bad in batch.bad] == [5]
    assert batch.mask.all()
    assert batch.labels.tolist() == expected.labels.tolist()
    assert int(batch.ids[5]) == 2  # the only other sample of class 2
    assert batch.ids.tolist() == [0, 1, 2, 3, 4, 2, 6, 7]
