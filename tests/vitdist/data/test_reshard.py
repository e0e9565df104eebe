"""New shards out of indexed ones. python -m pytest tests/vitdist/data/test_reshard.py"""

import collections
import functools
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitdist import rundir
from vitdist.data import reshard as module
from vitdist.data.index import Index, build
from vitdist.data.reshard import reshard, shuffled

SAMPLES = 40
CLASSES = ["ant", "bee"]


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (200, 130, 3), dtype=np.uint8)  # noise: 78 KB as a PNG
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def put_set(folder: Path, first: int = 0, path: bool = True, classes: list[str] = CLASSES, form: str = "cls") -> None:
    """40 pictures in two shards, the first class first, with a mask that vitdist does not know."""
    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for n in range(shard * SAMPLES // 2, (shard + 1) * SAMPLES // 2):
                label = n * 2 // SAMPLES
                members = {form: str(label).encode(), "png": picture(first + n), "mask.PNG": b"mask" * n}
                members |= {"group": f"nest {n // 4}".encode()}
                members |= {"path": f"{classes[label]}/ü{first + n}.png".encode()} if path else {}
                members |= {"json": json.dumps({"label": classes[label]}).encode()} if form == "txt" else {}
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"größe/{n:04d}.{extension}")
                    info.size, info.mtime = len(content), 17.5
                    tar.addfile(info, io.BytesIO(content))
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    build(folder, workers=1, label="json:label" if form == "txt" else "cls")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "source"
    put_set(folder)
    return folder


again = functools.partial(reshard, workers=2, progress=False, shard_bytes=1 << 20)


def samples(folder: Path) -> Iterator[tuple[str, str, str, tuple[tuple[str, bytes], ...]]]:
    """Key, class, group and members of each sample, in order."""
    opened = Index.open(folder)
    for i, group in enumerate(opened.groups() or []):
        yield opened.key(i), opened.classes[opened.labels[i]], group, tuple(sorted(opened.parts(i).items()))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_smaller_shards_hold_the_same_bytes(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again([source], tmp_path / "out")
    assert list(samples(tmp_path / "out")) == list(samples(source))
    before, after = Index.open(source), Index.open(tmp_path / "out")
    assert [after.read(i) for i in range(SAMPLES)] == [before.read(i) for i in range(SAMPLES)]
    assert len(after.shards) == 4
    assert all(shard.bytes <= 1 << 20 and shard.bytes % 10240 == 0 for shard in after.shards)
    assert "40 samples of 2 classes, 2 -> 4 shards" in capsys.readouterr().out
    with tarfile.open(tmp_path / "out/shard-000003.tar") as tar:
        assert tar.getnames()[-5:] == [f"größe/0039.{e}" for e in ("cls", "png", "mask.PNG", "group", "path")]
    kept = files(tmp_path / "out")
    build(tmp_path / "out", workers=1)  # a scan of what was written finds the same index
    assert files(tmp_path / "out") == kept


def test_one_large_shard(source: Path, tmp_path: Path) -> None:
    again([source], tmp_path / "out", shard_bytes=1 << 30)
    assert [shard.samples for shard in Index.open(tmp_path / "out").shards] == [SAMPLES]


def test_a_shuffle_mixes_classes_and_depends_on_the_seed_alone(source: Path, tmp_path: Path) -> None:
    for name, seed, workers in (("a", 7, 1), ("b", 7, 3), ("c", 8, 1)):
        again([source], tmp_path / name, shuffle=seed, workers=workers)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    keys = [[key for key, *_ in samples(tmp_path / name)] for name in "ac"]
    assert keys[0] != keys[1]
    assert sorted(samples(tmp_path / "a")) == sorted(samples(source))
    opened = Index.open(tmp_path / "a")
    assert all(
        len(set(opened.labels[a:b].tolist())) == 2 for a, b in zip(opened.starts, opened.starts[1:], strict=False)
    )


def test_the_shuffle_is_fixed_for_ever() -> None:
    assert shuffled(8, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert sorted(shuffled(1000, 2**64 - 1).tolist()) == list(range(1000))


def test_sets_are_merged_and_clashing_keys_numbered(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_set(tmp_path / "other", first=100, path=False)
    again([source, tmp_path / "other"], tmp_path / "out", shuffle=1)
    assert "keys clashed" in capsys.readouterr().out
    merged = list(samples(tmp_path / "out"))
    assert [key for key, *_ in merged] == [f"{n:09d}" for n in range(2 * SAMPLES)]
    expected = collections.Counter((label, group, members) for _, label, group, members in samples(source))
    for key, label, group, members in samples(tmp_path / "other"):
        expected[label, group, tuple(sorted([*members, ("path", key.encode())]))] += 1
    assert collections.Counter((label, group, members) for _, label, group, members in merged) == expected
    kept = files(tmp_path / "out")
    build(tmp_path / "out", workers=1)
    assert files(tmp_path / "out") == kept
    assert max(shard.bytes for shard in Index.open(tmp_path / "out").shards) <= 1 << 20


def test_unused_members_are_dropped_and_the_label_kept(tmp_path: Path) -> None:
    put_set(tmp_path / "set", form="txt")
    again([tmp_path / "set"], tmp_path / "out", only_used=True)
    found = list(samples(tmp_path / "out"))
    assert [[e for e, _ in members] for *_, members in found] == [["cls", "group", "path", "png"]] * SAMPLES
    assert [(key, label) for key, label, *_ in found] == [(key, label) for key, label, *_ in samples(tmp_path / "set")]
    kept = files(tmp_path / "out")
    build(tmp_path / "out", workers=1)  # by cls, the default
    assert files(tmp_path / "out") == kept


def test_goes_on_after_an_interruption(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    again([source], out)
    whole, second = files(out), (out / "shard-000001.tar").stat()
    for name in ("index.json", "index.arrow", "shard-000002.tar"):
        (out / name).unlink()
    (out / ".shard-000002.tar.4711").write_bytes(b"half")
    again([source], out)
    assert files(out) == whole
    assert (out / "shard-000001.tar").stat() == second
    third = (out / "shard-000002.tar").stat()
    again([source], out)
    assert (out / "shard-000002.tar").stat() == third


def test_a_broken_sample_is_named_and_leaves_no_index(tmp_path: Path) -> None:
    put_set(tmp_path / "set")
    path = tmp_path / "set/1.tar"
    content = bytearray(path.read_bytes())
    content[content.find(picture(30)) + 50] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"sample größe/0030 in .*1\.tar has changed.*vitdist verify FOLDER --repair"):
        again([tmp_path / "set"], tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists()
    assert not list((tmp_path / "out").glob(".*.tar.*"))


def test_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, content: object) -> int:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "open", lambda path, mode: Full(), raising=False)
        with pytest.raises(ValueError, match="out: the disk is full"):
            again([source], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar*"))
    nearly = collections.namedtuple("nearly", "free")(1_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda folder: nearly)
        with pytest.raises(ValueError, match="MB to write, 1 MB free"):
            again([source], tmp_path / "out")
    again([source], tmp_path / "out")


def test_clear_errors(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none: no such folder"):
        again([tmp_path / "none"], tmp_path / "out")
    with pytest.raises(ValueError, match="source is a source itself"):
        again([source], source)
    with pytest.raises(ValueError, match="given twice"):
        again([source, source], tmp_path / "out")
    with pytest.raises(ValueError, match="--shuffle -1: a number from 0"):
        again([source], tmp_path / "out", shuffle=-1)
    with pytest.raises(ValueError, match="--shard-megabytes"):
        again([source], tmp_path / "out", shard_bytes=1)
    put_set(tmp_path / "other", classes=["ant", "cow"])
    with pytest.raises(ValueError, match=r"differ in classes \(bee, cow\)"):
        again([source, tmp_path / "other"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").touch()
    with pytest.raises(ValueError, match="mine holds other files"):
        again([source], tmp_path / "mine")
    with pytest.raises(ValueError, match="is a file"):
        again([source], tmp_path / "mine/notes")
