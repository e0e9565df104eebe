"""What a snapshot holds, and what it must not."""

import json
import subprocess
from pathlib import Path

import pytest

from launch import folder, snapshot
from tests.launch.conftest import ROOT
from vitdist import config, rundir
from vitdist.rundir import RunDir

HERE = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t", "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t"}


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a commit, a change, an untracked, an ignored and a deleted file, and secrets."""
    for name, value in HERE.items():
        monkeypatch.setenv(name, value)
    root = tmp_path / "checkout"
    parts = ("launch/job.py", "vitdist/train.py", "vitdist/gone.py", "configs/a.yaml", "slurm/run.sh", "pyproject.toml")
    for name in (*parts, "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name}\n")
    (root / "slurm/run.sh").chmod(0o755)
    (root / "slurm/.tracked-secret").write_text("old secret\n")
    (root / ".gitignore").write_text("*.ignored\n")
    git(root, "init", "-q")
    git(root, "remote", "add", "origin", "https://user:secret-token@example.org/x.git")
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    (root / "vitdist/train.py").write_text("changed\n")
    (root / "vitdist/gone.py").unlink()
    (root / "vitdist/new.py").write_text("new\n")
    (root / "vitdist/x.ignored").write_text("ignored\n")
    (root / "vitdist/large.py").write_bytes(b"#" * 1_000_001)
    for secret in (".env", "slurm/.env", "slurm/.tracked-secret", "slurm/prod.env", "configs/id.pem"):
        (root / secret).write_text("API_KEY=secret-key\n")
    outside = tmp_path / "outside.txt"
    outside.write_text("secret outside\n")
    (root / "configs/out.yaml").symlink_to(outside)
    (root / "configs/in.yaml").symlink_to("a.yaml")
    (root / "configs/env.yaml").symlink_to("../.env")
    return root


EXPECTED = [
    "configs/a.yaml",
    "configs/in.yaml",
    "launch/job.py",
    "pyproject.toml",
    "slurm/run.sh",
    "vitdist/new.py",
    "vitdist/train.py",
]


def test_X1_untracked_files_are_in_it_and_secrets_are_not(checkout: Path) -> None:
    assert [str(path) for path in snapshot.files(checkout)] == EXPECTED


def test_X1_a_snapshot_is_whole_and_tells_no_secret(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-in-environment")
    run = RunDir(tmp_path / "runs" / "x")
    snapshot.take(checkout, run, ["launch/submit.py", "--nodes", "4"])
    assert sorted(str(p.relative_to(run.code)) for p in run.code.rglob("*") if p.is_file()) == EXPECTED
    assert (run.code / "vitdist/train.py").read_text() == "changed\n"
    assert not (run.code / "configs/in.yaml").is_symlink()
    assert (run.code / "slurm/run.sh").stat().st_mode & 0o100
    env = json.loads(run.env.read_text())
    assert env["commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert env["dirty"] is True
    assert env["argv"] == ["launch/submit.py", "--nodes", "4"]
    assert env["schema"] == 1
    for path in run.path.rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path


def test_the_patch_makes_the_snapshot_of_the_commit(checkout: Path, tmp_path: Path) -> None:
    patch = tmp_path / "patch.diff"
    patch.write_text(snapshot.patch(checkout))
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(checkout), str(clone))
    git(clone, "apply", str(patch))
    assert (clone / "vitdist/train.py").read_text() == "changed\n"
    assert (clone / "vitdist/new.py").read_text() == "new\n"
    assert not (clone / "vitdist/gone.py").exists()


def test_reading_a_checkout_leaves_its_index_alone(checkout: Path, tmp_path: Path) -> None:
    before = (checkout / ".git/index").read_bytes()
    snapshot.take(checkout, RunDir(tmp_path / "run"), [])
    assert (checkout / ".git/index").read_bytes() == before
    assert git(checkout, "diff", "--cached") == ""


def test_changes_since_a_snapshot_are_named(checkout: Path, tmp_path: Path) -> None:
    code = tmp_path / "code"
    snapshot.copy(checkout, code)
    (code / "vitdist/__pycache__").mkdir()
    (code / "vitdist/__pycache__/train.pyc").touch()
    assert snapshot.changed(checkout, code) == []
    (checkout / "launch/job.py").write_text("other\n")
    (checkout / "vitdist/new.py").unlink()
    assert [str(path) for path in snapshot.changed(checkout, code)] == ["launch/job.py", "vitdist/new.py"]


def test_without_git_the_folders_are_walked(tmp_path: Path) -> None:
    root = tmp_path / "plain"
    (root / "vitdist/__pycache__").mkdir(parents=True)
    for name in ("vitdist/train.py", "vitdist/.env", "vitdist/__pycache__/x.pyc", "pyproject.toml", "secret.txt"):
        (root / name).touch()
    run = RunDir(tmp_path / "run")
    snapshot.take(root, run, [])
    assert [str(path) for path in snapshot.files(root)] == ["pyproject.toml", "vitdist/train.py"]
    assert run.patch.read_text() == ""
    assert json.loads(run.env.read_text())["commit"] is None


@pytest.mark.parametrize("links", [True, False])
def test_a_point_of_a_sweep_has_the_same_code(links: bool, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored once where there are links; a file system without them gets copies."""
    if not links:
        monkeypatch.setattr(snapshot.os, "link", refuse)
    home, point = RunDir(checkout.parent / "s"), RunDir(checkout.parent / "s-00")
    snapshot.take(checkout, home, ["x"])
    (home.code / "launch" / "__pycache__").mkdir()
    snapshot.share(home, point)
    assert sorted(str(path.relative_to(point.code)) for path in point.code.rglob("*.*")) == EXPECTED
    for mine, its in ((home.patch, point.patch), (home.env, point.env), (home.code, point.code)):
        inside = "slurm/run.sh" if mine.is_dir() else ""
        assert (mine / inside).samefile(its / inside) == links
        assert (mine / inside).read_bytes() == (its / inside).read_bytes()
    assert (point.code / "slurm/run.sh").stat().st_mode & 0o111
    assert not snapshot.changed(checkout, point.code)


def refuse(*_: object) -> None:
    raise OSError(1, "Operation not permitted")


def test_the_recipe_is_recorded_and_kept_when_a_run_goes_on_with_other_code(checkout: Path, tmp_path: Path) -> None:
    run, settings = RunDir(tmp_path / "run"), config.load(ROOT / "configs" / "demo.yaml")
    for attempt, recipe in enumerate(["configs/demo.yaml", ""]):
        parts = folder.Parts(settings, {}, "", attempt, ["launch/submit.py"], checkout, None, attempt > 0, recipe)
        with folder.made(run, parts):
            env = rundir.read_json(run.env)
            assert env is not None
            assert env["recipe"] == "configs/demo.yaml"
    assert (run.path / "env-before-attempt-1.json").is_file()
