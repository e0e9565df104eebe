"""The command `vitdist`: what it makes, and its refusals."""

import subprocess
import sys
from pathlib import Path

import pytest

from vitdist import cli
from vitdist.data.index import Index
from vitdist.rundir import RunDir

ROOT = Path(__file__).parents[2]


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
        (["plan", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["evaluate", "nowhere"], "nowhere is no run folder"),
        (["evaluate", "./nowhere", "--data", "nowhere"], "nowhere: no such folder"),
        (["evaluate", "nowhere", "--at-precision", "0.9"], "--at-precision needs --data"),
        (["evaluate", "nowhere", "--at-recall", "0.9"], "--at-recall needs --data"),
        (["predict", "./nowhere", "picture.jpg"], "picture.jpg: no such picture"),
        (["predict", "./nowhere", str(ROOT / "tests")], "no pictures in it"),
        (["export", "./nowhere", "--to", "onnx"], "nowhere: no such run folder"),
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
    for name in (
        "pack",
        "index",
        "verify",
        "stats",
        "ls",
        "cat",
        "reshard",
        "digits",
        "plan",
        "evaluate",
        "predict",
        "export",
    ):
        assert f"\n    {name} " in done.stdout
    assert all(f"\n    {name} " in done.stdout for name in ("report", "sync"))


def test_settings_stand_anywhere_after_the_command() -> None:
    """argparse alone takes positional arguments in one piece."""
    for words in (
        "evaluate RUN model.heads=4 --data x data.mean=[1,2,3]",
        "evaluate model.heads=4 RUN --data x data.mean=[1,2,3]",
        "evaluate --data x model.heads=4 data.mean=[1,2,3] RUN",
    ):
        args = cli._parse(words.split())
        assert (args.source, args.data, args.overrides) == (["RUN"], "x", ["model.heads=4", "data.mean=[1,2,3]"])
    args = cli._parse(["predict", "RUN", "a.png", "--csv", "t.csv", "data.eval_crop=1.0"])
    assert (args.source, args.pictures, args.overrides) == ("RUN", ["a.png"], ["data.eval_crop=1.0"])
    assert cli._parse(["predict", "RUN", "my.photo=1.jpg"]).pictures == ["my.photo=1.jpg"]
    args = cli._parse(["plan", "c.yaml", "optim.lr=1", "--classes", "3", "model.freeze=all"])
    assert (args.overrides, args.classes) == (["optim.lr=1", "model.freeze=all"], 3)
    assert cli._parse(["plan", "c.yaml"]).overrides == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("evaluate RUN --bogus", "vitdist evaluate: error: unrecognized arguments: --bogus"),
        ("pack a b optim.lr=1", "vitdist pack: error: unrecognized arguments: optim.lr=1"),
        ("evaluate model.heads=4", "settings alone: model.heads=4"),
        ("predict RUN x --top 0", "'0' is not a number of at least 1"),
        ("evaluate RUN --recall-of a --at-precision 95", "'95' is not a share"),
        ("export RUN", "--to"),
    ],
)
def test_wrong_words_are_told_with_the_usage_of_the_command(
    words: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words.split())
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.startswith(f"usage: vitdist {words.split()[0]}")


def test_plan_asks_the_data_for_the_number_of_classes(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(recipe), "optim.lr=0.25"]) == 0
    text = capsys.readouterr().out
    head = next(line for line in text.splitlines() if line.startswith("03_head"))
    assert "0.25" in head
    assert str(2 * 32 + 32 * 3 + 3) in head  # norm, classifier of 3 classes
    assert cli.main(["plan", str(recipe), "data.train=/nowhere"]) == 2
    assert "--classes N" in capsys.readouterr().err
    assert cli.main(["plan", str(recipe), "data.train=/nowhere", "--classes", "5"]) == 0
    assert str(2 * 32 + 32 * 5 + 5) in capsys.readouterr().out


@pytest.mark.parametrize(("world", "begins"), [("1", "error: "), ("4", "rank 3: error: ")])
def test_of_several_ranks_each_says_which_it_is(
    world: str, begins: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["report", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith(begins)


@pytest.mark.parametrize(("command", "told"), [("index", "goes on where it stopped"), ("report", "interrupted\n")])
def test_what_goes_on_after_an_interruption_says_so(
    command: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, f"_{command}", interrupt)
    assert cli.main([command, "x"]) == 130
    assert told in capsys.readouterr().err
