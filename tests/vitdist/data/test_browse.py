"""Listing samples and taking members out. python -m pytest tests/vitdist/data/test_browse.py"""

import io
import json
import os
import pty
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from vitdist.data import browse
from vitdist.data.index import Index, build

JPEG = b"\xff\xd8\xff\0"


def put_set(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "s.tar", "w") as tar:
        for n in range(count):
            label = "ant" if n % 2 else "bee"
            path = f"{label}/bild ü.v{n}.jpg\t".encode()
            parts = {"cls": label.encode(), "jpg": JPEG + bytes([n % 256]), "seg.png": b"mask", "path": path}
            for extension, content in {**parts, "group": f"g{n}".encode()}.items():
                info = tarfile.TarInfo(f"dir.d/{n:03d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    build(folder, workers=1)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_set(tmp_path_factory.mktemp("sets") / "set")


def test_ls(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    browse.ls(folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split("\t") == ["dir.d/001", "ant", "5", "s.tar", "g1", "ant/bild ü.v1.jpg "]
    assert len(lines) == 6
    browse.ls(folder, name="bee", as_json=True, paths=False)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [told["row"] for told in found] == [0, 2, 4]
    assert found[0] == {
        "row": 0, "key": "dir.d/000", "class": "bee", "bytes": 5, "shard": "s.tar", "group": "g0",
    }  # fmt: skip
    with pytest.raises(ValueError, match="no class 'bea': did you mean bee"):
        browse.ls(folder, name="bea")


def test_ls_lists_broken_samples_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put_set(tmp_path / "set")
    content = (folder / "s.tar").read_bytes()
    (folder / "s.tar").write_bytes(content.replace(JPEG + b"\x03", JPEG + b"\x33"))
    browse.ls(folder)
    lines = capsys.readouterr().out.splitlines()
    assert "dir.d/003 in" in lines[3]
    assert "has changed since it was indexed" in lines[3]
    assert len(lines) == 6


def test_ls_ends_with_its_reader(tmp_path: Path) -> None:
    folder = put_set(tmp_path / "set", 3000)  # more than a pipe holds
    code = f"from vitdist import cli; raise SystemExit(cli.main(['ls', {str(folder)!r}]))"
    command = f'"{sys.executable}" -c "{code}" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("dir.d/000\tbee")


@pytest.mark.parametrize("wanted", ["#3", "#3.jpg", "dir.d/003", "dir.d/003.jpg", "ant/bild ü.v3.jpg\t"])
def test_cat_a_picture(folder: Path, capfdbinary: pytest.CaptureFixture[bytes], wanted: str) -> None:
    browse.cat(folder, wanted)
    assert capfdbinary.readouterr().out == JPEG + b"\x03"


@pytest.mark.parametrize("wanted", ["#3.seg.png", "dir.d/003.seg.png", "ant/bild ü.v3.jpg\t.Seg.PNG"])
def test_cat_another_member(folder: Path, tmp_path: Path, wanted: str) -> None:
    browse.cat(folder, wanted.replace("\t.Seg.PNG", "\t.CLS"), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (b"ant" if "\t" in wanted else b"mask")


def test_cat_refuses_a_terminal(folder: Path, tmp_path: Path) -> None:
    """A real one: what a person sees."""
    master, slave = pty.openpty()
    code = (
        "import sys; from vitdist.data import browse\ntry: browse.cat(*sys.argv[1:])\nexcept ValueError as e: print(e)"
    )
    for wanted, expected in (
        ("#0", b"is nothing to read on a terminal: add > FILE.jpg, or -o FILE"),
        ("#0.cls", b"bee"),
    ):
        subprocess.run([sys.executable, "-c", code, str(folder), wanted], stdout=slave, check=True)
        assert expected in os.read(master, 4096)
    os.close(master)
    os.close(slave)


def test_unknown_names(folder: Path) -> None:
    opened = Index.open(folder)
    with pytest.raises(ValueError, match=r"no sample 'dir\.d/03': did you mean dir\.d/003"):
        browse.find(opened, "dir.d/03")
    with pytest.raises(ValueError, match=r"no row #6: rows are #0 to #5"):
        browse.find(opened, "#6")
    with pytest.raises(ValueError, match="no row #x"):
        browse.find(opened, "#x")
    with pytest.raises(ValueError, match=r"sample dir\.d/000 has no \.txt: it has \.cls, \.jpg, \.seg\.png"):
        browse.cat(folder, "#0.txt")
