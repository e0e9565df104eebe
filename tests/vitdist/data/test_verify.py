"""Verifying and mending shards. python -m pytest tests/vitdist/data/test_verify.py"""

import functools
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vitdist.data import verify
from vitdist.data.index import Index, build
from vitdist.data.tar import File

NAMES = ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
SAMPLES = 5
CLASSES = ["ant", "bee", "cat"]


def picture(seed: int, form: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def put_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def sample(number: int, image: bytes | None = None) -> list[tuple[str, bytes]]:
    """Three members; the class goes with the number."""
    key = f"{number:04d}"
    return [
        (f"{key}.cls", str(number % 3).encode()),
        (f"{key}.jpg", picture(number) if image is None else image),
        (f"{key}.path", f"{CLASSES[number % 3]}/{number}.jpg".encode()),
    ]


def put_set(folder: Path, broken_images: dict[int, bytes] | None = None) -> None:
    folder.mkdir(parents=True)
    for shard, name in enumerate(NAMES):
        numbers = range(shard * SAMPLES, (shard + 1) * SAMPLES)
        put_tar(folder / name, [m for n in numbers for m in sample(n, (broken_images or {}).get(n))])
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "whole"
    put_set(folder)
    build(folder, workers=1)
    return folder


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "damaged"))


look = functools.partial(verify.verify, workers=1, progress=False)


def broken(result: verify.Result) -> list[int]:
    return [int(sample.key) for sample in result.broken]


def contents(folder: Path) -> dict[str, tuple[str, bytes, str]]:
    opened = Index.open(folder)
    return {
        opened.key(i): (opened.classes[opened.labels[i]], opened.image(i), opened.source(i)) for i in range(len(opened))
    }


def assert_mended(result: verify.Result, whole: Path, out: Path, lost: list[int], less: range = range(0)) -> None:
    """What `repair` writes is the whole set without `lost`, and nothing else."""
    shutil.rmtree(out, ignore_errors=True)
    verify.repair(result, out, workers=1, progress=False)
    expected = {key: rest for key, rest in contents(whole).items() if int(key) not in lost and int(key) not in less}
    assert contents(out) == expected
    assert look(out).ok
    assert [int(line.split("\t")[1]) for line in (out / "removed.txt").read_text().splitlines()] == lost


def test_all_is_well(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.run(whole, workers=2) == 0
    assert "15 samples in 3 shards" in (said := capsys.readouterr().out)
    assert "all is well" in said
    assert verify.run(whole, as_json=True, decode=False, out=whole / "never", workers=1) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert not (whole / "never").exists()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@example(place=0.0, flip=1)
@example(place=0.9999, flip=255)
def test_D2_a_flipped_byte_costs_one_sample(whole: Path, tmp_path: Path, place: float, flip: int) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    path = folder / NAMES[1]
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    content[at] ^= flip
    path.write_bytes(content)
    opened = Index.open(whole)
    spans = [opened.span(i) for i in range(SAMPLES, 2 * SAMPLES)]
    hit = [SAMPLES + k for k, (_, start, size) in enumerate(spans) if start <= at < start + size]
    result = look(folder, decode=False)
    assert broken(result) == hit
    assert [bool(s.fault) for s in result.shards] == [False, True, False]
    assert not result.ok
    assert_mended(result, whole, tmp_path / "mended", hit)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True))
@example(place=0.0)
def test_D1_a_cut_costs_what_lies_behind_it(whole: Path, tmp_path: Path, place: float) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    path = folder / NAMES[0]
    content = path.read_bytes()
    cut = int(place * len(content))
    path.write_bytes(content[:cut])
    opened = Index.open(whole)
    lost = [i for i in range(SAMPLES) if sum(opened.span(i)[1:]) > cut]
    result = look(folder, decode=False)
    assert broken(result) == lost
    assert result.shards[0].fault.startswith("cut off" if cut else "empty")
    assert_mended(result, whole, tmp_path / "mended", lost)


def test_D4_a_missing_shard(whole: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (damaged / NAMES[2]).unlink()
    result = look(damaged)
    assert broken(result) == list(range(10, 15))
    assert_mended(result, whole, tmp_path / "mended", list(range(10, 15)))
    assert verify.run(damaged, workers=1) == 1
    said = capsys.readouterr().out
    assert f"{NAMES[2]}: missing: 5 of 5 samples broken\n" in said
    assert "0010" not in said  # the shard's line says it all
    assert f"vitdist verify {damaged} --repair OUT" in said


def test_D9_swapped_shards_are_told_and_lose_nothing(whole: Path, damaged: Path, tmp_path: Path) -> None:
    (damaged / NAMES[0]).rename(damaged / "x")
    (damaged / NAMES[1]).rename(damaged / NAMES[0])
    (damaged / "x").rename(damaged / NAMES[1])
    result = look(damaged)
    assert set(broken(result)) == set(range(10))
    assert result.reasons() == {"its shard has another's name": 10}
    assert result.shards[0].fault == f"holds the bytes of {NAMES[1]}; its own bytes lie in {NAMES[1]}: give it its name"
    assert_mended(result, whole, tmp_path / "mended", [])


def test_a_renamed_shard(whole: Path, damaged: Path, tmp_path: Path) -> None:
    (damaged / NAMES[0]).rename(damaged / "other.tar")
    result = look(damaged)
    assert result.shards[0].fault == "missing; its own bytes lie in other.tar: give it its name"
    assert [(s.name, s.fault) for s in result.shards[3:]] == [("other.tar", "not in the index")]
    assert_mended(result, whole, tmp_path / "mended", [])


def test_D9_a_shard_overwritten_by_another(whole: Path, damaged: Path, tmp_path: Path) -> None:
    shutil.copy(damaged / NAMES[0], damaged / NAMES[1])
    result = look(damaged)
    assert broken(result) == list(range(5, 10))
    assert result.shards[1].fault == f"holds the bytes of {NAMES[0]}"
    assert_mended(result, whole, tmp_path / "mended", list(range(5, 10)))


def bad_pictures() -> dict[int, bytes]:
    """Pictures that were broken when they were packed: no CRC finds them."""
    png = picture(7, "PNG")
    return {
        2: picture(2)[:-200],  # a download that stopped
        4: b"",
        7: png[:60] + bytes([png[60] ^ 1]) + png[61:],
        11: b"<html>404</html>",
    }


def test_D3_pictures_that_do_not_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_set(tmp_path / "set", bad_pictures())
    build(tmp_path / "set", workers=1)
    assert verify.run(tmp_path / "set", out=tmp_path / "mended", workers=2) == 1
    said = capsys.readouterr().out
    assert f"{NAMES[0]}  0002  cat  not decodable: " in said
    assert "mended: 11 samples are whole, 4 left out" in said
    assert "  cat: 2 left out, 3 left" in said
    assert look(tmp_path / "set", decode=False).ok
    assert broken(look(tmp_path / "set")) == [2, 4, 7, 11]
    assert sorted(map(int, contents(tmp_path / "mended"))) == [0, 1, 3, 5, 6, 8, 9, 10, 12, 13, 14]


def test_what_a_decoder_only_warns_of_is_told_and_kept(tmp_path: Path) -> None:
    striped = picture(3)
    put_set(tmp_path / "set", {3: striped[:-100] + b"\xff\xd9" + striped[-98:]})
    build(tmp_path / "set", workers=1)
    result = look(tmp_path / "set")
    assert result.ok
    assert [s.key for shard in result.shards for s in shard.odd] == ["0003"]
    assert "decodes with a warning" in verify.text(result)


def test_repair_refuses_and_goes_on(whole: Path, damaged: Path, tmp_path: Path) -> None:
    (damaged / NAMES[2]).unlink()
    result = look(damaged, decode=False)
    with pytest.raises(ValueError, match="not mended in place"):
        verify.repair(result, damaged)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").touch()
    with pytest.raises(ValueError, match="mine holds other files"):
        verify.repair(result, tmp_path / "mine")
    out = tmp_path / "mended"
    said = verify.repair(result, out, workers=1, progress=False)
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    (out / "index.json").unlink()
    (out / NAMES[1]).unlink()
    assert verify.repair(result, out, workers=1, progress=False) == said
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first
    for path in damaged.glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match="no sample is whole"):
        verify.repair(look(damaged), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_all_splits_of_a_folder(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        shutil.copytree(whole, tmp_path / "sets" / split)
    assert verify.run(tmp_path / "sets", workers=1) == 0
    assert capsys.readouterr().out.count("all is well") == 2
    (tmp_path / "sets/val" / NAMES[0]).unlink()
    assert verify.run(tmp_path / "sets", as_json=True, out=tmp_path / "mended", workers=1) == 1
    assert [found["ok"] for found in json.loads(capsys.readouterr().out)] == [True, False]
    assert [p.name for p in (tmp_path / "mended").iterdir()] == ["val"]
    assert len(Index.open(tmp_path / "mended/val")) == 10


def test_shards_that_lie_elsewhere(whole: Path, damaged: Path, tmp_path: Path) -> None:
    build(f"{damaged}/shard-{{000000..000001}}.tar", CLASSES, out=tmp_path / "index", workers=1)
    assert look(tmp_path / "index").ok  # the third is none of this set's
    (damaged / NAMES[1]).write_bytes(b"")
    result = look(tmp_path / "index")
    assert_mended(result, whole, tmp_path / "mended", list(range(5, 10)), less=range(10, 15))


# ---- without an index -------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    put_set(tmp_path / "bare")
    return tmp_path / "bare"


def test_tars_that_can_be_indexed(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.run(bare, workers=1) == 0
    assert f"all is well; run: vitdist index {bare}" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["header", "magic", "zeros"])
@pytest.mark.parametrize("number", [0, 6, 8, 14])
def test_D2_salvage_behind_a_damaged_header(whole: Path, bare: Path, tmp_path: Path, number: int, part: str) -> None:
    """Each of the three headers of a sample in turn: the sample is lost, its neighbours are not."""
    path = bare / NAMES[number // SAMPLES]
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [m.offset for m in tar if m.name.startswith(f"{number:04d}.")]
    for header in headers:
        hurt = bytearray(content)
        hurt[header : header + 512] = {
            "header": bytes([hurt[header] ^ 1]) + hurt[header + 1 : header + 512],
            "magic": hurt[header : header + 257] + b"USTAR" + hurt[header + 262 : header + 512],
            "zeros": bytes(512),
        }[part]
        path.write_bytes(hurt)
        result = look(bare)
        assert not result.ok
        assert set(broken(result)) <= {number}
        out = tmp_path / f"mended {header}"
        verify.repair(result, out, workers=1, progress=False)
        assert contents(out) == {key: rest for key, rest in contents(whole).items() if int(key) != number}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True))
@example(place=0.0)
def test_D1_salvage_of_a_cut_tar(whole: Path, tmp_path: Path, place: float) -> None:
    shutil.rmtree(tmp_path / "bare", ignore_errors=True)
    shutil.rmtree(tmp_path / "mended", ignore_errors=True)
    put_set(tmp_path / "bare")
    path = tmp_path / "bare" / NAMES[0]
    content = path.read_bytes()
    path.write_bytes(content[: int(place * len(content))])
    opened = Index.open(whole)
    kept = [i for i in range(15) if i >= SAMPLES or sum(opened.span(i)[1:]) <= int(place * len(content))]
    verify.repair(look(tmp_path / "bare"), tmp_path / "mended", workers=1, progress=False)
    assert sorted(map(int, contents(tmp_path / "mended"))) == kept


def test_salvage_leaves_out_what_no_index_takes(bare: Path, tmp_path: Path) -> None:
    key = "extra"
    members = [*sample(0), ("a.jpg", picture(1)), ("b.cls", b"1"), *sample(20), *sample(21, b"no"), *sample(0)]
    put_tar(bare / f"{key}.tar", members)
    result = look(bare)
    reasons = {s.key: s.reason for s in result.broken}
    assert "no .cls member" in reasons["a"]
    assert "has no picture" in reasons["b"]
    assert "not decodable" in reasons["0021"]
    assert reasons["0000"] == "its key came before"
    verify.repair(result, tmp_path / "mended", workers=1, progress=False)
    assert len(Index.open(tmp_path / "mended")) == 17


def test_a_whole_tar_has_no_gaps(bare: Path) -> None:
    with open(bare / NAMES[0], "rb") as file:
        found = verify.salvage(File(file.fileno()))
    assert [len(parts) for parts in found.whole] == [3] * SAMPLES
    assert (found.torn, found.gaps) == ([], [])


def test_clear_errors(tmp_path: Path, damaged: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        verify.verify(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no tar shards"):
        verify.verify(tmp_path / "empty")
    (damaged / "index.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match=r"index\.arrow does not fit index\.json: run: vitdist index"):
        verify.verify(damaged)
