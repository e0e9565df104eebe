"""The run folder: files that appear whole, rows that count once, one writer."""

import contextlib
import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from vitdist import rundir
from vitdist.rundir import RunDir


def test_published_files_are_whole_and_leave_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a" / "record.json"
    rundir.publish_json(path, {"x": "é"})
    assert rundir.read_json(path) == {"schema": rundir.SCHEMA, "x": "é"}
    rundir.publish(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_publish_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record"
    rundir.publish(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        rundir.publish(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["record"]


def test_records_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"schema": rundir.SCHEMA + 1}))
    with pytest.raises(ValueError, match="written by a newer vitdist"):
        rundir.read_json(path)
    assert rundir.read_json(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is damaged"),
        (b'{"state": "do', "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"[1]", "holds no record"),
        (b"null", "holds no record"),
        (b'{"schema": "1"}', "holds no record"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"train.json: {said}"):
        rundir.read_json(path)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a b", "a\nb", "$(x)", "-x", "a" * 101, "é"])
def test_names_that_are_no_folder_or_job_name(name: str) -> None:
    with pytest.raises(ValueError, match="run name"):
        rundir.check_name(name)


def test_rolled_back_rows_count_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    rows = [
        {"attempt": 0, "train/global_step": 10, "train/loss": 3},
        {"attempt": 0, "train/global_step": 20, "train/loss": 2},
        {"attempt": 0, "train/global_step": 20, "val/loss": 2.5},
        {"attempt": 0, "train/global_step": 30, "train/loss": 1},
        {"attempt": 1, "train/global_step": 20, "train/loss": 2.1},
        {"attempt": 1, "train/global_step": 25, "train/loss": 1.9},
    ]
    run.metrics.write_text("\n".join(map(json.dumps, rows)) + '\n{"attempt": 1, "train/glo')
    assert [(r["train/global_step"], r.get("train/loss")) for r in rundir.rows(run)] == [(10, 3), (20, 2.1), (25, 1.9)]


def test_one_process_holds_a_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with rundir.only_writer(run), pytest.raises(BlockingIOError), rundir.only_writer(run):
        pass
    with rundir.only_writer(run):
        pass


@pytest.mark.parametrize(("code", "lawful"), [(errno.ENOSYS, True), (errno.ENOLCK, True), (errno.EIO, False)])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, lawful: bool
) -> None:
    def refuse(file: object, flags: int) -> None:
        raise OSError(code, "not here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    refused = contextlib.nullcontext() if lawful else pytest.raises(OSError, match="not here")
    with refused, rundir.only_writer(RunDir(tmp_path)):
        assert lawful
    assert ("no file locks here" in capsys.readouterr().err) == lawful


def test_attempts_and_state(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.next_attempt() == 0
    assert rundir.state(run) == {"state": "submitted"}
    rundir.publish_json(run.attempt(0).train, {"state": "stopped"})
    rundir.publish_json(run.attempt(10).job, {})
    assert [a.number for a in run.attempts()] == [0, 10]
    assert run.next_attempt() == 11
    assert rundir.state(run)["state"] == "stopped"
