"""The command `vitdist`: what it makes, and its refusals."""

import subprocess
import sys
from pathlib import Path

import pytest

from vitdist import cli
from vitdist.data.index import Index
from vitdist.rundir import RunDir


def test_from_pictures_to_shards_and_a_new_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["digits", str(tmp_path / "pictures")]) == 0
    assert cli.main(["pack", str(tmp_path / "pictures"), str(tmp_path / "shards"), "--shard-megabytes", "2"]) == 0
    packed = Index.open(tmp_path / "shards" / "train")
    assert (len(packed), packed.classes, len(packed.shards)) == (1442, list("0123456789"), 3)
    (tmp_path / "shards" / "train" / "index.json").unlink()
    assert cli.main(["index", str(tmp_path / "shards" / "train")]) == 0
    assert "1,442 samples of 10 classes" in capsys.readouterr().out
    assert Index.open(tmp_path / "shards" / "train").digest == packed.digest


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["report", "nowhere"], "nowhere is no run folder"),
        (["sync", "nowhere"], "nowhere is no run folder"),
        (["pack", "nowhere", "out"], "nowhere"),
        (["index", "nowhere"], "nowhere"),
        (["verify", "nowhere"], "nowhere"),
        (["stats", "nowhere"], "nowhere"),
        (["ls", "nowhere"], "nowhere"),
        (["cat", "nowhere", "x"], "nowhere"),
        (["reshard", "nowhere", "out"], "nowhere"),
        (["index", ".", "--classes", "none.txt"], "none.txt"),
    ],
)
def test_refusals_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert reason in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_with_nothing_to_upload_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunDir(tmp_path).config.write_text("")
    assert cli.main(["sync", str(tmp_path)]) == 0
    assert "nothing to upload" in capsys.readouterr().out


def test_help_is_told_without_torch() -> None:
    code = "import sys; from vitdist import cli\ntry: cli.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("pack", "index", "verify", "stats", "ls", "cat", "reshard", "digits", "report", "sync"):
        assert f"\n    {name} " in done.stdout
