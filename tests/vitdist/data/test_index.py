"""The index: what it reads, and that nothing damaged passes. python -m pytest tests/vitdist/data/test_index.py"""

import hashlib
import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitdist.data import index
from vitdist.data.index import Index, build, scan


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT, mtime: float = 0) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))


def samples(names: list[str]) -> list[tuple[str, bytes]]:
    return [
        m for i, name in enumerate(names) for m in ((f"{name}.cls", f"{i % 3}".encode()), (f"{name}.png", picture(i)))
    ]


NAMES = ["a", "dir.d/b", "Größe/猫/" + "x" * 120, "y" * 180 + "/ü"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_tarfile_writes(tmp_path: Path, form: int) -> None:
    write_tar(tmp_path / "s.tar", samples(NAMES), form, mtime=1.5 if form == tarfile.PAX_FORMAT else 0)
    build(tmp_path)
    opened = Index.open(tmp_path)
    whole = (tmp_path / "s.tar").read_bytes()
    assert len(opened) == 4
    assert opened.labels.tolist() == [0, 1, 2, 0]
    assert opened.counts == [2, 1, 1]
    assert opened.classes == ["class 0", "class 1", "class 2"]
    for i, row in enumerate(opened.rows):
        start, size = int(row["offset"]), int(row["size"])
        with tarfile.open(fileobj=io.BytesIO(whole[start : start + size] + bytes(1024))) as span:
            assert span.getnames() == [f"{NAMES[i]}.cls", f"{NAMES[i]}.png"]  # its extension headers are in the span
        assert zlib.crc32(whole[start : start + size]) == row["crc32"]
        assert opened.image(i) == picture(i)
        assert opened.key(i) == opened.source(i) == NAMES[i]


def test_keys_are_those_of_webdataset(tmp_path: Path) -> None:
    from webdataset.tariterators import base_plus_ext

    for name in [*NAMES, "a.b/c", ".hidden", "no_extension", "x/.y", "a b", "double.dot"]:
        match = index._KEY.fullmatch(f"{name}.Seg.PNG")
        assert (match.groups() if match else (None, None)) == base_plus_ext(f"{name}.Seg.PNG")


def test_ustar_prefix_other_members_and_directories(tmp_path: Path) -> None:
    name = "p" * 90 + "/" + "q" * 60
    members = [("__meta__/about.json", b"{}"), *samples([name]), ("README", b"text"), *samples(["z"])]
    write_tar(tmp_path / "s.tar", members)
    with tarfile.open(tmp_path / "s.tar", "a") as tar:
        info = tarfile.TarInfo("folder")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    build(tmp_path)
    opened = Index.open(tmp_path)
    assert [opened.key(i) for i in range(len(opened))] == [name, "z"]


def test_every_flipped_header_bit_is_found(tmp_path: Path) -> None:
    tar = tmp_path / "s.tar"
    write_tar(tar, samples(["a", "b"]))
    whole = tar.read_bytes()
    with tarfile.open(tar) as opened:
        headers = [member.offset for member in opened]
    for header in headers:
        for at in range(header, header + 512, 5):
            tar.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            if at != header + 155:  # the space behind the checksum is not part of anything
                with pytest.raises(ValueError, match=r"s\.tar: (damaged|cut)"):
                    scan(tar)
        tar.write_bytes(whole[:header] + bytes(512) + whole[header + 512 :])
        with pytest.raises(ValueError, match="behind the end mark"):
            scan(tar)


def test_every_cut_is_found(tmp_path: Path) -> None:
    tar = tmp_path / "s.tar"
    write_tar(tar, samples(["a", "b"]))
    whole = tar.read_bytes()
    rows = scan(tar).rows
    end = int(rows["offset"][-1] + rows["size"][-1])
    for size in [*range(0, end + 512, 256), 100, end - 1, end + 511]:
        tar.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut off|are no tar"):
            scan(tar)
    tar.write_bytes(whole + whole)
    with pytest.raises(ValueError, match="second tar"):
        scan(tar)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*samples(["a", "b"]), ("a.txt", b"")], "members of 'a' do not lie together"),
        ([("a.cls", b"1")], "sample 'a' has no picture"),
        ([("a.png", b"x")], r"sample 'a' has no \.cls"),
        ([("a.png", b"x"), ("a.cls", b"cat")], "label of 'a' is b'cat', not an integer"),
        ([("a.png", b"x"), ("a.cls", b"-1")], "has label -1"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"1")], "more than one picture"),
        ([("a.png", b"x"), ("a.cls", b"1"), ("a.cls", b"2")], "the same member twice"),
    ],
)
def test_refuses_what_is_no_sample(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(ValueError, match=message):
        build(tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    digests = []
    for folder, classes in (("one", ["x", "y", "z"]), ("two", ["x", "y", "z"]), ("three", ["x", "y", "Z"])):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "s.tar", samples(["a", "b", "c"]))
        build(tmp_path / folder, classes)
        digests.append(Index.open(tmp_path / folder).digest)
    assert digests[0] == digests[1] != digests[2]
    build(tmp_path / "three")  # the names are kept in classes.txt
    opened = Index.open(tmp_path / "three")
    assert (opened.classes, opened.digest) == (["x", "y", "Z"], digests[2])
    assert opened.shards[0].sha256 == hashlib.sha256((tmp_path / "three" / "s.tar").read_bytes()).hexdigest()
    assert json.dumps(opened.summary())
    with pytest.raises(ValueError, match="label 2 has no name in a list of 2"):
        build(tmp_path / "one", ["x", "y"])


def test_open_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vitdist pack PICTURES OUT"):
        Index.open(tmp_path / "none")
    with pytest.raises(ValueError, match=f"vitdist pack {tmp_path} OUT"):
        Index.open(tmp_path)
    folder = tmp_path / "train"
    folder.mkdir()
    write_tar(folder / "s.tar", samples(["a", "b"]))
    with pytest.raises(ValueError, match=f"did you mean {folder}"):
        Index.open(tmp_path)
    with pytest.raises(ValueError, match=f"without an index; run: vitdist index {folder}"):
        Index.open(folder)
    build(folder)
    record = json.loads((folder / "index.json").read_text())
    for text, message in (
        (json.dumps(record | {"version": 99}), "newer vitdist"),
        ("{", "run: vitdist index"),
        ("{}", "another program"),
        (json.dumps(record | {"shards": record["shards"] * 2}), "does not fit"),
    ):
        (folder / "index.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Index.open(folder)
    build(folder)
    write_tar(folder / "s.tar", samples([str(i) for i in range(9)]))
    with pytest.raises(ValueError, match=r"s\.tar has .* bytes, not the"):
        Index.open(folder)
    write_tar(folder / "t.tar", samples(["a"]))
    (folder / "s.tar").unlink()
    with pytest.raises(ValueError, match=r"s\.tar is missing"):
        Index.open(folder)
