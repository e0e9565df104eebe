"""Rows and records; what a full disk, W&B, its service and its server can do to them: nothing that ends a run.

pytest tests/vitdist/test_tracking.py
"""

import contextlib
import errno
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import fake_wandb, logs_workers
from vitdist import mirror, rundir, selection, tracking
from vitdist.rundir import RunDir
from vitdist.tracking import Journal

ROOT = Path(__file__).parents[2]


def lines(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def train_record(run: RunDir, attempt: int = 0) -> dict[str, Any]:
    return rundir.read_json(run.attempt(attempt).train) or {}


def events(run: RunDir, kind: str) -> list[str]:
    return [event["text"] for event in train_record(run).get("events", []) if event["kind"] == kind]


def until(holds: Callable[[], Any], within_s: float = 30) -> None:
    """Wait until `holds()`; fails after `within_s` seconds."""
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


# ---- rows and records --------------------------------------------------------------------------


def test_figures_that_are_not_finite_stay_json(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with Journal(run, run.attempt(0), first=True) as journal:
        journal.row(1, {"train/loss": float("nan"), "optim/grad_norm": float("inf"), "optim/loss_scale": 2.0})
    (row,) = lines(run)
    assert (row["train/loss"], row["optim/grad_norm"], row["optim/loss_scale"]) == (None, None, 2.0)


def test_a_torn_line_of_a_killed_attempt_is_ended(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.metrics.write_text('{"attempt": 0, "train/global_step": 1, "train/loss": 2.0}\n{"attempt": 0, "tra')
    with Journal(run, run.attempt(1), first=True) as journal:
        journal.row(2, {"train/loss": 1.0})
    assert [row["train/global_step"] for row in rundir.rows(run)] == [1, 2]


@pytest.mark.parametrize(("error", "state"), [(ValueError("bad shards"), "refused"), (OSError(28, "full"), "failed")])
def test_the_record_says_why_an_attempt_ended(tmp_path: Path, error: Exception, state: str) -> None:
    run = RunDir(tmp_path)
    journal = Journal(run, run.attempt(0), first=True)
    with pytest.raises(type(error)), journal:
        raise error
    record = train_record(run)
    assert record["state"] == state
    assert record["error"]["type"] == type(error).__name__
    assert record["ended"]
    assert [path.name for path in run.attempt(0).path.iterdir()] == ["train.json"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with Journal(run, run.attempt(0), first=False) as journal:
        journal.row(1, {"train/loss": 1.0})
        journal.record(state="done")
        journal.say("x")
        journal.warn("slow_rank", "x")
        journal.publish(run.evaluation, "x")
        journal.start_mirrors(logs_workers.settings(), {}, 0)
        journal.stopping()
    assert not run.path.exists()


def test_warnings_are_told_and_recorded_events_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "MOST_EVENTS", 2)
    run = RunDir(tmp_path)
    with Journal(run, run.attempt(0), first=True) as journal:
        journal.row(7, {"train/loss": 1.0})
        journal.warn("slow_rank", "rank 3 is slow")
        for _ in range(3):
            journal.event("skipped_step", "not finite")
    record = train_record(run)
    assert [(e["step"], e["kind"], e["text"]) for e in record["events"]] == [
        (7, "slow_rank", "rank 3 is slow"),
        (7, "skipped_step", "not finite"),
    ]
    assert record["events_left_out"] == 2
    out = capsys.readouterr().out
    assert "warning: rank 3 is slow\n" in out
    assert "not finite" not in out


def test_threads_lose_no_event_and_wait_for_no_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    publish, hangs, goes_on = rundir.publish, threading.Event(), threading.Event()
    with Journal(run, run.attempt(0), first=True) as journal:
        threads = [threading.Thread(target=journal.event, args=("slow_rank", str(i))) for i in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        def slow(path: Path, content: str | bytes) -> None:
            hangs.set()
            assert goes_on.wait(30)
            publish(path, content)

        monkeypatch.setattr(rundir, "publish", slow)
        writer = threading.Thread(target=journal.record, kwargs={"step": 8})
        writer.start()
        assert hangs.wait(30)
        journal.event("slow_data", "while the disk hangs")  # returns: the writer is still held
        monkeypatch.setattr(tracking, "PATIENCE_S", 0.01)
        journal.record(reason="hang")
        assert writer.is_alive()
        goes_on.set()
        writer.join()
        assert (train_record(run)["reason"], train_record(run)["step"]) == ("hang", 8)
        assert events(run, "slow_data") == ["while the disk hangs"]
        assert sorted(events(run, "slow_rank"), key=int) == [str(i) for i in range(20)]


# ---- a full disk -------------------------------------------------------------------------------


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path, size: str = "768k") -> None:
        self.path, self._ballast = path, path / "ballast"
        path.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True)
        if done.returncode:
            path.rmdir()
            pytest.skip("needs the right to mount a tmpfs")

    def fill(self) -> None:
        with open(self._ballast, "ab", buffering=0) as file:
            for size in (4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        self._ballast.unlink()

    def make_read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.path], check=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", self.path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    yield made
    made.close()


class Bad(NamedTuple):
    key: str
    reason: str


def test_C3_rows_and_records_wait_for_room_and_come_in_order(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(disk.path / "run")
    done = selection.Evaluations(run)
    with Journal(run, run.attempt(0), first=True) as journal:
        done = selection.Evaluations(run, journal.publish)
        done.record(1, {"top1": 0.5})
        journal.row(1, {"train/loss": 1.0})
        disk.fill()
        for step in range(2, 101):  # more than the rest of a page
            journal.row(step, {"train/loss": 1.0, "perf/images_per_s": 2.0 * step})
        done.record(100, {"top1": 0.9})
        journal.publish(run.predictions, b"figures")
        journal.bad_samples(100, "train", [Bad("k" * 2000, "torn"), Bad("l" * 4000, "torn")])
        journal.record(step=100)
        assert run.metrics.read_text().endswith("}\n")
        assert 1 <= len(lines(run)) < 100
        assert selection.history(run, "top1") == [(1, 0.5)]
        assert done.history("top1") == [(1, 0.5), (100, 0.9)]
        disk.free()
        journal.row(101, {"train/loss": 1.0})
        assert [row["train/global_step"] for row in lines(run)] == list(range(1, 102))
        assert selection.history(run, "top1") == [(1, 0.5), (100, 0.9)]
        assert run.predictions.read_bytes() == b"figures"
    assert [json.loads(line)["key"][0] for line in run.bad_samples.read_text().splitlines()] == ["k", "l"]
    record = train_record(run)
    assert record["step"] == 100
    told = [event["text"] for event in record["events"] if event["kind"] == "disk_full"]
    assert "cannot be written (No space left on device)" in told[0]
    assert all("room on the disk again" in text for text in told[1:])
    out = capsys.readouterr().out
    assert out.count("warning: ") == 1
    assert not list(run.path.rglob(".*"))


def test_C3_the_last_record_is_written_on_a_full_disk(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(disk.path / "run")
    with Journal(run, run.attempt(0), first=True) as journal:
        journal.row(1, {"train/loss": 1.0})
        disk.fill()
        for step in range(2, 101):
            journal.row(step, {"train/loss": 1.0})
        journal.record(state="done", summary={"top1": 0.9})
    assert train_record(run)["state"] == "done"
    assert len(lines(run)) == 100  # the reserve served them too


def test_C3_a_disk_that_is_full_from_start_to_end_loses_old_rows(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "MOST_KEPT", 50)
    run = RunDir(disk.path / "run")
    disk.fill()
    with Journal(run, run.attempt(0), first=True) as journal:
        for step in range(100):
            journal.row(step, {"train/loss": 1.0})
        journal.publish(run.evaluation, "{}")
    out = capsys.readouterr().out
    assert out.count("cannot be written (No space left on device)") == 1
    assert "warning: the disk is full to the end: 100 rows, train.json, evaluation.json could not be written" in out


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_C3_a_row_cut_short_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    run = RunDir(tmp_path)
    write, cut = os.write, [True]

    def short(handle: int, data: bytes) -> int:
        if cut and data.startswith(b'{"attempt"'):
            return write(handle, data[:10])
        if cut:
            raise OSError(number, os.strerror(number))
        return write(handle, data)

    with Journal(run, run.attempt(0), first=True) as journal:
        journal.row(1, {"train/loss": 1.0})
        monkeypatch.setattr(os, "write", short)
        journal.row(2, {"train/loss": 1.0})
        assert [row["train/global_step"] for row in lines(run)] == [1]
        cut.clear()
        journal.row(3, {"train/loss": 1.0})
    assert [row["train/global_step"] for row in lines(run)] == [1, 2, 3]


def test_faults_that_are_no_matter_of_room_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)

    def closed(handle: int, data: bytes) -> int:
        raise OSError(errno.EBADF, "Bad file descriptor")

    def log() -> None:
        with Journal(run, run.attempt(0), first=True) as journal, monkeypatch.context() as patch:
            patch.setattr(os, "write", closed)
            journal.row(1, {"train/loss": 1.0})

    with pytest.raises(OSError, match="Bad file"):
        log()
    assert train_record(run)["state"] == "failed"


@pytest.mark.parametrize("how", ["talkative", "redirected"])
def test_C3_a_log_on_a_full_disk_costs_lines_only(disk: Disk, how: str) -> None:
    command, log = [sys.executable, "-m", "tests.logs_workers", how, disk.path], disk.path / "rank.log"
    with open(log, "a") as file:  # to which talkative sends itself
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=60)
    text = log.read_text()
    assert done.returncode == 0, text
    assert text.startswith("before\n")
    assert "after\n" in text
    assert "Traceback" not in text
    assert text.count("x" * 40) < 2_000


# ---- Weights & Biases --------------------------------------------------------------------------


def offline(run: RunDir) -> list[Path]:
    return sorted(run.wandb.glob("offline-run-*"))


def kept(folder: Path) -> int:
    """Rows in the .wandb file of a W&B run: LevelDB's log, of which a kill may leave the last record torn."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    data, at, record, found = path.read_bytes(), 7, b"", 0
    while at + 7 <= len(data):
        rest = 32768 - at % 32768
        if rest < 7:
            at += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0 or at + 7 + length > len(data):
            break
        record = (b"" if kind in (1, 2) else record) + data[at + 7 : at + 7 + length]  # 1 whole, 2 first, 3, 4 last
        at += 7 + length
        if kind in (1, 4):
            parsed = wandb_internal_pb2.Record()
            parsed.ParseFromString(record)
            found += parsed.WhichOneof("record_type") == "history"
    return found


def train(run: RunDir, rows: int = 20, wandb: Any = "auto", attempt: int = 0) -> None:
    with Journal(run, run.attempt(attempt), first=True) as journal:
        journal.start_mirrors(logs_workers.settings(wandb=wandb), {"settings": {}}, 0)
        for step in range(rows):
            journal.row(step, {"train/loss": 1.0})
        journal.record(state="done")


def test_rows_arrive_and_the_run_ends(tmp_path: Path, server: fake_wandb.Server) -> None:
    run = RunDir(tmp_path / "run")
    train(run)
    ((name, rows),) = server.rows.items()
    assert name == (run.wandb / "run-id").read_text()
    assert [row["train/global_step"] for row in rows] == list(range(20))
    assert server.ends[-1] == {"complete": True, "exitcode": 0, "preempting": None}
    assert events(run, "wandb") == []
    assert logs_workers.services() == []


def test_S1_a_stopped_run_is_preempted_at_wandb(tmp_path: Path, server: fake_wandb.Server) -> None:
    run = RunDir(tmp_path / "run")
    with Journal(run, run.attempt(0), first=True) as journal:
        journal.start_mirrors(logs_workers.settings(), {}, 0)
        journal.row(1, {"train/loss": 1.0})
        journal.stopping()
    assert any(end["preempting"] for end in server.ends)
    assert server.ends[-1]["exitcode"] == rundir.EXIT_STOPPED
    assert events(run, "wandb") == []


def test_a_failed_run_has_failed_at_wandb(tmp_path: Path, server: fake_wandb.Server) -> None:
    run = RunDir(tmp_path / "run")

    def fail() -> None:
        with Journal(run, run.attempt(0), first=True) as journal:
            journal.start_mirrors(logs_workers.settings(), {}, 0)
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert server.ends[-1]["exitcode"] == 1
    assert events(run, "wandb") == []


@pytest.mark.parametrize("wish", ["auto", "online"])
def test_W1_without_a_key_the_rows_are_kept_offline(
    tmp_path: Path, wandb_home: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wish: str
) -> None:
    run = RunDir(tmp_path / "run")
    train(run, wandb=wish)
    assert [kept(folder) for folder in offline(run)] == [20]
    out = capsys.readouterr().out
    assert out.count("W&B") == 1
    assert f"`vitdist sync {run.path}`" in out


@pytest.mark.parametrize("behave", ["refuse", "hang", 401, 500])
def test_W2_a_server_that_cannot_be_had_at_the_start(
    tmp_path: Path, server: fake_wandb.Server, wandb_home: pytest.MonkeyPatch, behave: Any
) -> None:
    if behave == "refuse":
        wandb_home.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    else:
        server.behave = behave
    run = RunDir(tmp_path / "run")
    train(run)
    (told,) = events(run, "wandb")
    assert told.startswith("W&B cannot be reached (")
    assert f"`vitdist sync {run.path}` uploads it" in told
    assert [kept(folder) for folder in offline(run)] == [20]
    assert server.rows == {}
    assert train_record(run)["state"] == "done"


def test_W2_a_start_that_never_ends_is_not_waited_for(
    tmp_path: Path, wandb_home: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seconds in {"START_S": 0.1, "FINISH_S": 0.1, "GRACE_S": 0.1}.items():
        wandb_home.setattr(mirror, name, seconds)
    module, goes_on = types.ModuleType("wandb"), threading.Event()

    def init(**options: Any) -> None:
        goes_on.wait(60)
        raise ConnectionError("late")

    vars(module).update(Settings=lambda **options: options, init=init, teardown=lambda **options: None)
    wandb_home.setitem(sys.modules, "wandb", module)
    run = RunDir(tmp_path / "run")
    train(run, wandb="offline")
    goes_on.set()
    assert [text.split(" within ")[0] for text in events(run, "wandb")] == ["W&B has not started", "W&B did not end"]
    assert len(lines(run)) == 20
    assert train_record(run)["state"] == "done"
    until(lambda: "wandb" not in [thread.name for thread in threading.enumerate()])
    assert "late" not in capsys.readouterr().out


@pytest.mark.parametrize("behave", ["hang", 500])
def test_W3_a_server_that_goes_away_in_mid_run(tmp_path: Path, server: fake_wandb.Server, behave: Any) -> None:
    run = RunDir(tmp_path / "run")
    with Journal(run, run.attempt(0), first=True) as journal:
        journal.start_mirrors(logs_workers.settings(), {}, 0)
        server.behave = behave
        for step in range(500):
            journal.row(step, {"train/loss": 1.0})
        journal.record(state="done")
    (folder,) = (path for path in run.wandb.glob("run-*") if path.is_dir())
    (told,) = events(run, "wandb")
    assert told.startswith("W&B did not take all rows within 1 s of the end")
    assert told.endswith(f"vitdist sync --include-online {run.path}")
    assert kept(folder) == len(lines(run)) == 500
    assert logs_workers.services() == []


@pytest.mark.parametrize("behave", ["hang", "ok"])
def test_W4_wandb_core_stopped(
    tmp_path: Path, server: fake_wandb.Server, wandb_home: pytest.MonkeyPatch, behave: Any
) -> None:
    """SIGSTOP: what it does not read fills its socket, then our queue; then rows are dropped."""
    for name, value in {"WAITING": 20, "GRACE_S": 0.5}.items():
        wandb_home.setattr(mirror, name, value)
    run = RunDir(tmp_path / "run")
    wide = {f"lr/{i}": 0.1 for i in range(400)}
    with Journal(run, run.attempt(0), first=True) as journal:
        journal.start_mirrors(logs_workers.settings(), {}, 0)
        server.behave = behave
        until(logs_workers.services)
        (service,) = logs_workers.services()
        os.kill(service, signal.SIGSTOP)
        steps = 0
        while not events(run, "wandb"):
            assert steps < 5_000
            journal.row(steps, wide)
            steps += 1
        journal.record(state="done")
    told = events(run, "wandb")
    assert "W&B has not taken 20 rows" in told[0]
    assert "did not end within 2 s" in told[1]
    assert "W&B lacks" in told[2]
    assert len(told) == 3
    assert len(lines(run)) == steps
    assert logs_workers.services() == []
    assert train_record(run)["state"] == "done"


def test_W4_wandb_core_killed(tmp_path: Path, wandb_home: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "tests.logs_workers", "killed_service", tmp_path / "run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("warning: W&B failed and is left out from here on (") == 1
    run = RunDir(tmp_path / "run")
    assert len(lines(run)) == logs_workers.ROWS
    assert train_record(run)["state"] == "done"


def test_W5_a_killed_trainer_loses_at_most_the_last_second(tmp_path: Path, wandb_home: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "run")
    command = [sys.executable, "-m", "tests.logs_workers", "rows_without_end", run.path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            # The newest row is written when the next one comes.
            until(lambda: offline(run) and list(offline(run)[0].glob("*.wandb")))
            until(lambda: kept(offline(run)[0]) >= logs_workers.ROWS - 1)
        finally:
            process.kill()
    assert kept(offline(run)[0]) >= logs_workers.ROWS - 1
    assert len(lines(run)) == logs_workers.ROWS


def test_W6_W7_starts_in_the_same_second_share_the_run_and_keep_their_rows(
    tmp_path: Path, wandb_home: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    for attempt in (0, 1):
        train(run, 5, "offline", attempt)
    name = (run.wandb / "run-id").read_text()
    assert [kept(folder) for folder in offline(run)] == [5, 5]
    assert all(list(folder.glob(f"run-{name}.wandb")) for folder in offline(run))


@pytest.mark.parametrize("how", ["read-only", "full"])
def test_W8_a_folder_that_takes_nothing_from_the_start(
    tmp_path: Path, disk: Disk, wandb_home: pytest.MonkeyPatch, how: str
) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.wandb.symlink_to(disk.path)
    if how == "full":
        disk.fill()
    else:
        disk.make_read_only()
    train(run, wandb="offline")
    (told,) = events(run, "wandb")
    assert told.startswith("W&B failed and is left out from here on (OSError: ")
    assert len(lines(run)) == 20
    assert logs_workers.services() == []


def test_W8_a_folder_that_is_full_in_mid_run(tmp_path: Path, disk: Disk, wandb_home: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.wandb.symlink_to(disk.path)
    with Journal(run, run.attempt(0), first=True) as journal:
        journal.start_mirrors(logs_workers.settings(wandb="offline"), {}, 0)
        disk.fill()
        for step in range(20):
            journal.row(step, {"train/loss": 1.0})
        journal.record(state="done")
    told = events(run, "wandb")
    assert told[0].startswith("W&B may lack rows: its folder cannot be written (OSError: [Errno 28]")
    assert len(lines(run)) == 20
    assert train_record(run)["state"] == "done"


def test_W9_wandb_that_is_not_installed_is_told_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = RunDir(tmp_path)
    train(run, 1, "offline")
    (told,) = events(run, "wandb")
    assert told.startswith("W&B failed and is left out from here on (ModuleNotFoundError: ")
    assert len(lines(run)) == 1
