"""The index: what it reads, and that nothing damaged passes. python -m pytest tests/vitdist/data/test_index.py"""

import hashlib
import io
import json
import os
import pickle
import subprocess
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitdist.data import tar as tars
from vitdist.data import verify
from vitdist.data.index import Index, _scan_once, build, join, scan
from vitdist.data.reshard import reshard


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
    for i in range(4):
        shard, start, size = opened.span(i)
        assert shard == 0
        with tarfile.open(fileobj=io.BytesIO(whole[start : start + size] + bytes(1024))) as span:
            assert span.getnames() == [f"{NAMES[i]}.cls", f"{NAMES[i]}.png"]  # its extension headers are in the span
        assert zlib.crc32(whole[start : start + size]) == opened.columns["crc32"][i]
        assert opened.image(i) == picture(i)
        assert opened.key(i) == opened.source(i) == NAMES[i]


def test_keys_are_those_of_webdataset(tmp_path: Path) -> None:
    from webdataset.tariterators import base_plus_ext

    for name in [*NAMES, "a.b/c", ".hidden", "no_extension", "x/.y", "a b", "double.dot"]:
        match = tars._KEY.fullmatch(f"{name}.Seg.PNG")
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


def test_D2_every_flipped_header_bit_is_found(tmp_path: Path) -> None:
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


def test_D1_every_cut_is_found(tmp_path: Path) -> None:
    tar = tmp_path / "s.tar"
    write_tar(tar, samples(["a", "b"]))
    whole = tar.read_bytes()
    columns = scan(tar).columns
    end = int(columns["offset"][-1] + columns["size"][-1])
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
        (
            [("a.png", b"x"), ("a.txt", b"cat")],
            r"has no \.cls member with its class beside it; it has others: --label txt",
        ),
        ([("a.png", b"x"), ("a.json", b"{}")], r"it has others: --label json:FIELD"),
        ([("a.png", b"x"), ("a.cls", b" ")], "the label of 'a' is empty"),
        ([("a.png", b"x"), ("a.cls", b"-1")], r"s\.tar: sample 'a' has label -1"),
        ([("a.png", b"x"), ("a.cls", b"4294967296")], r"s\.tar: sample 'a' has label 4294967296, too high"),
        ([], "an empty tar, it holds no samples"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"1")], "more than one picture"),
        ([("a.png", b"x"), ("a.cls", b"1"), ("a.cls", b"2")], "the same member twice"),
    ],
)
def test_D4_D5_what_is_no_sample_is_refused(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(ValueError, match=message):
        build(tmp_path)
    assert not (tmp_path / "index.json").exists()


class Evil:
    """A pickle that touches a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_D8_members_of_a_stranger_execute_nothing_and_are_written_nowhere(tmp_path: Path) -> None:
    """Pickles, names that lead out of a folder, links: a tar is read, never unpacked."""
    folder, ran = tmp_path / "a" / "set", tmp_path / "ran"
    folder.mkdir(parents=True)
    evil = pickle.dumps(Evil(ran))
    members = [
        *(("x.cls", b"0"), ("x.png", picture(0)), ("x.pkl", evil), ("x.pyd", evil), ("x.pth", evil), ("x.npy", evil)),
        *(("../../out.cls", b"1"), ("../../out.png", picture(1))),
        *((f"{tmp_path}/absolute.cls", b"0"), (f"{tmp_path}/absolute.png", picture(2))),
    ]
    write_tar(folder / "s.tar", members)
    with tarfile.open(folder / "s.tar", "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(path for path in tmp_path.rglob("*"))
    build(folder)
    index = Index.open(folder)
    assert [index.image(i) for i in range(len(index))] == [picture(0), picture(1), picture(2)]
    assert [index.labels[i] for i in range(len(index))] == [0, 1, 0]
    result = verify.verify(folder, workers=1, progress=False)
    assert len(result.broken) == 0
    reshard([str(folder)], str(tmp_path / "again"), workers=1)
    assert len(Index.open(tmp_path / "again")) == 3
    assert not ran.exists()
    made = {path for path in tmp_path.rglob("*") if path not in before and not path.is_relative_to(tmp_path / "again")}
    assert {path.relative_to(folder).parts[0] for path in made} == {
        ".index",
        "index.arrow",
        "index.json",
    }


def test_D6_D9_the_digest_is_of_the_content(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match=r"numbers of its own classes.txt \(x, y, z \.\.\.\), not of another list"):
        build(tmp_path / "one", ["z", "y", "x"])  # would make other classes of the same numbers, without a word
    (tmp_path / "one/classes.txt").unlink()
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
        (json.dumps(record | {"version": 1}), "older vitdist"),
        ("{", "run: vitdist index"),
        ("{}", "another program"),
        (json.dumps(record | {"shards": record["shards"] * 2}), "does not fit"),
    ):
        (folder / "index.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Index.open(folder)
    build(folder)
    table = bytearray((folder / "index.arrow").read_bytes())
    table[len(table) // 2] ^= 1  # a label may be under it
    (folder / "index.arrow").write_bytes(table)
    with pytest.raises(ValueError, match="does not fit"):
        Index.open(folder)
    build(folder)
    write_tar(folder / "new.tar", samples(["n"]))
    with pytest.raises(ValueError, match=r"new\.tar is not in the index"):
        Index.open(folder)
    (folder / "new.tar").unlink()
    write_tar(folder / "s.tar", samples([str(i) for i in range(9)]))
    with pytest.raises(ValueError, match=r"s\.tar has .* bytes, not the"):
        Index.open(folder)
    write_tar(folder / "t.tar", samples(["a"]))
    (folder / "s.tar").unlink()
    with pytest.raises(ValueError, match=r"s\.tar is missing"):
        Index.open(folder)


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar"])
def test_reads_what_plain_tar_writes(tmp_path: Path, form: str) -> None:
    source = tmp_path / "source"
    for i, name in enumerate(["a", "ü" * 45, "long/" * 30 + "z"]):
        for extension, content in (("png", picture(i)), ("cls", str(i).encode())):
            path = source / f"{name}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    shards = tmp_path / "shards"
    shards.mkdir()
    command = ["tar", f"--format={form}", "--sort=name", "-cf", str(shards / "s.tar"), "-C", str(source), "."]
    subprocess.run(command, check=True)
    build(shards)
    opened = Index.open(shards)
    assert {opened.key(i): int(opened.labels[i]) for i in range(3)} == {
        "./a": 0,
        "./" + "ü" * 45: 1,
        "./" + "long/" * 30 + "z": 2,
    }
    assert [opened.image(i) for i in range(3)] == [picture(int(label)) for label in opened.labels]


def test_labels_in_txt_and_json(tmp_path: Path) -> None:
    """img2dataset writes KEY.jpg, KEY.txt and KEY.json; names become classes in their alphabetical order."""
    members = []
    for i, name in enumerate(["dog", "cat", "猫", "cat"]):
        about = {"caption": "x", "label": i % 2, "deep": {"name": name}, "share": 0.5, "real": float(i)}
        members += [(f"{i:09d}.jpg", picture(i)), (f"{i:09d}.json", json.dumps(about).encode())]
        members += [(f"{i:09d}.txt", f" {name}\n".encode())]
    write_tar(tmp_path / "s.tar", members)
    for label, classes, labels in (
        ("txt", ["cat", "dog", "猫"], [1, 0, 2, 0]),
        ("json:deep.name", ["cat", "dog", "猫"], [1, 0, 2, 0]),
        ("json:label", ["class 0", "class 1"], [0, 1, 0, 1]),
        ("json:real", ["class 0", "class 1", "class 2", "class 3"], [0, 1, 2, 3]),
    ):
        build(tmp_path, label=label)
        opened = Index.open(tmp_path)
        assert (opened.classes, opened.labels.tolist()) == (classes, labels)
        (tmp_path / "index.json").unlink()
    for label, message in (
        ("json:missing", "has no field 'missing'; there are: caption, label, deep, share, real"),
        ("json:share", "its label 'share' is 0.5, neither a number nor a name"),
        ("json:deep", "neither a number nor a name"),
        ("jpg", "write cls, txt or json:FIELD"),
    ):
        with pytest.raises(ValueError, match=message):
            build(tmp_path, label=label)
    with pytest.raises(ValueError, match="sample '000000002' has label '猫', which is not among the 2 classes"):
        build(tmp_path, ["dog", "cat"], label="txt")
    assert not (tmp_path / "index.json").exists()


def test_other_labels_are_another_data_set(tmp_path: Path) -> None:
    """The same bytes by another field, and names that are digits."""
    about = [{"a": i % 2, "b": i // 2 % 2, "name": "021"[i % 3]} for i in range(6)]
    write_tar(
        tmp_path / "s.tar",
        [m for i, a in enumerate(about) for m in ((f"{i}.png", picture(i)), (f"{i}.json", json.dumps(a).encode()))],
    )
    digests = set()
    for field in ("a", "b"):
        build(tmp_path, label=f"json:{field}")
        digests.add(Index.open(tmp_path).digest)
    assert len(digests) == 2
    build(tmp_path, ["0", "2", "1"], label="json:name")
    opened = Index.open(tmp_path)
    assert [opened.classes[label] for label in opened.labels] == [a["name"] for a in about]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b" + bytes(2000), "is compressed \\(gzip\\)"),
        (b"BZh" + bytes(2000), "is compressed \\(bzip2\\)"),
    ],
)
def test_compressed_shards(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build(tmp_path)


def test_members_apart_are_told_with_the_way_out(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", [("a.png", picture(0)), ("b.png", picture(1)), ("a.cls", b"0"), ("b.cls", b"1")])
    with pytest.raises(ValueError, match="must lie side by side: tar --sort=name"):
        build(tmp_path)


def test_indexing_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", samples([name, name + name]))
    (tmp_path / "c.tar").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"c\.tar: 7 bytes are no tar"):
        build(tmp_path, workers=1)
    scanned: list[str] = []
    monkeypatch.setattr("vitdist.data.index.scan", lambda path, *rest: scanned.append(path.name) or scan(path, *rest))
    write_tar(tmp_path / "c.tar", samples(["c"]))
    write_tar(tmp_path / "b.tar", samples(["b", "bb"])[::-1])  # of the same size
    for name in ("b.tar", "c.tar"):
        _scan_once(str(tmp_path), "cls", tmp_path / ".index", name)
    _scan_once(str(tmp_path), "cls", tmp_path / ".index", "a.tar")
    assert scanned == ["b.tar", "c.tar"]
    build(tmp_path)
    opened = Index.open(tmp_path)
    assert opened.keys() == ["a", "aa", "bb", "b", "c"]
    assert [opened.image(i) for i in (2, 3)] == [picture(1), picture(0)]


def test_D9_one_shard_twice_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", samples(["x", "y"]))
    with pytest.raises(ValueError, match=r"b\.tar and a\.tar are the same shard"):
        build(tmp_path)


def test_sets_are_joined(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "s.tar", samples([f"{name}{i}" for i in range(3 + number)]))
        build(tmp_path / name, ["x", "y", "z"])
    parts = [Index.open(tmp_path / name) for name in "ab"]
    both = join(parts)
    assert (len(both), both.counts) == (7, [3, 2, 2])
    assert [both.key(i) for i in range(7)] == parts[0].keys() + parts[1].keys()
    assert [both.image(i) for i in range(3, 7)] == [parts[1].image(i) for i in range(4)]
    assert both.digest not in (parts[0].digest, parts[1].digest, join(parts[::-1]).digest)
    (tmp_path / "b/classes.txt").unlink()
    build(tmp_path / "b", ["x", "y", "Z"])
    with pytest.raises(ValueError, match=r"differ in classes \(Z, z\)"):
        join([parts[0], Index.open(tmp_path / "b")])


def test_an_index_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for i in range(3):
        write_tar(tmp_path / f"shards/part-{i}.tar", samples([f"{i}-{j}" for j in range(3)]))
    build(f"{tmp_path}/shards/part-{{0..1}}.tar", out=tmp_path / "index")
    opened = Index.open(tmp_path / "index")
    assert [opened.key(i) for i in range(6)] == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    assert opened.image(4) == picture(1)
    with pytest.raises(ValueError, match="no names of shards"):
        build(tmp_path / "nothing")


def test_shards_and_index_behind_a_url(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", samples([f"{i}-{j}" for j in range(3)]))
        memory.pipe_file(f"/set/{i}.tar", (tmp_path / f"{i}.tar").read_bytes())
    build("memory://set/{0..1}.tar", out=tmp_path / "index")
    here = Index.open(tmp_path / "index")
    assert [here.image(i) for i in range(6)] == [picture(i % 3) for i in range(6)]
    assert not list((tmp_path / "index/.index").glob("tmp*"))
    for name in ("index.json", "index.arrow"):
        memory.pipe_file(f"/set/{name}", (tmp_path / "index" / name).read_bytes())
    there = Index.open("memory://set")
    assert (there.digest, there.keys()) == (here.digest, here.keys())
    assert there.image(5) == picture(2)
    memory.pipe_file("/set/0.tar", b"shorter")
    with pytest.raises(ValueError, match=r"memory://set/0\.tar has 7 bytes, not the .* indexed"):
        Index.open("memory://set")
    with pytest.raises(ValueError, match="say with --out in which folder"):
        build("memory://set/{0..1}.tar")
    with pytest.raises(ValueError, match="cannot be listed: name the shards"):
        build("memory://set", out=tmp_path / "index")
    with pytest.raises(ValueError, match=r"memory://nothing/index.json: not there"):
        Index.open("memory://nothing")
