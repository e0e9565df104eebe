"""`vitdist sync` against the W&B stand-in: each row once, in its order, whatever was disturbed; never marked unsent.

pytest tests/vitdist/test_sync.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import fake_wandb
from vitdist import sync, upload
from vitdist.rundir import RunDir

WRITER = """
import sys, wandb
folder, name, *starts = sys.argv[1:]
settings = wandb.Settings(console="off", disable_git=True, silent=True, x_disable_stats=True)
for start in map(int, starts):
    run = wandb.init(project="vitdist", id=name, dir=folder, mode="offline", resume="allow", settings=settings)
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step")
    for step in range(start, start + 10):
        run.log({"train/global_step": step, "train/loss": 1 / (step + 1), "text": "x" * 5000})
    last = str(start) == starts[-1]
    if last:
        model = wandb.Artifact("first-model", "model")
        model.add_reference(f"file://{folder}", checksum=False)
        run.log_artifact(model)
    if not last:
        run.mark_preempting()
    run.finish(exit_code=0 if last else 75)
"""
"""Three starts of one run, the second of which was cut back to step 8, the third to 15; rows that span the blocks."""
STARTS = (0, 8, 15)
STEPS = [step for start in STARTS for step in range(start, start + 10)]


def until(holds: Callable[[], Any], within_s: float = 60) -> None:
    """Wait until `holds()`; fails after `within_s` seconds."""
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with its three offline parts."""
    folder = tmp_path_factory.mktemp("written") / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()
    spare = {name: text for name, text in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "-c", WRITER, str(folder), "first", *map(str, STARTS)]
    subprocess.run(command, env=spare, check=True, timeout=120, stdout=subprocess.DEVNULL)
    return folder


def copied(written: Path, to: Path, parts: int = len(STARTS)) -> RunDir:
    """A run with the first `parts` of the parts."""
    shutil.copytree(written, to, symlinks=True)
    run = RunDir(to)
    for folder in upload.folders(run, online=False)[parts:]:
        shutil.rmtree(folder)
    return run


def another(run: RunDir, name: str) -> RunDir:
    """Make it another W&B run: a name of the same length in the records."""
    for log in run.wandb.glob("offline-*/*.wandb"):
        rows = [record.replace(b"first", name.encode()) for record in upload.records(log, log.stat().st_size) if record]
        rewritten(log, rows)
    return run


def rewritten(log: Path, records: list[bytes]) -> None:
    head = log.read_bytes()[: upload.HEAD]
    with open(log, "wb") as file:
        file.write(head)
        for record in records:
            upload.append(file, record)


def log(run: RunDir, part: int = 0) -> Path:
    found = upload.log_of(upload.folders(run, online=True)[part])
    assert found
    return found


def training(run: RunDir, state: str) -> None:
    run.attempt(0).path.mkdir(parents=True, exist_ok=True)
    run.attempt(0).train.write_text(json.dumps({"schema": 1, "state": state}))


def vitdist(*arguments: str | Path, **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vitdist.cli", "sync", *map(str, arguments)]
    return subprocess.Popen(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how})


def done(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, output and errors of `vitdist sync`."""
    with vitdist(*arguments) as process:
        out, error = process.communicate(timeout=120)
    assert "Traceback" not in error
    return process.returncode, out, error


def steps(server: fake_wandb.Server, run: str = "first") -> list[tuple[int, int]]:
    """The axis that we log, and the one that W&B counts."""
    return [(row["train/global_step"], row["_step"]) for row in server.rows.get(run, [])]


EXPECTED = list(zip(STEPS, range(len(STEPS)), strict=True))


# ---- against the stand-in ----------------------------------------------------------------------


def test_W11_killed_midway_and_repeated_each_row_is_there_once(
    server: fake_wandb.Server, written: Path, tmp_path: Path
) -> None:
    runs = [copied(written, tmp_path / "runs" / "a"), another(copied(written, tmp_path / "runs" / "b"), "other")]
    torn = log(runs[0], part=1)
    torn.write_bytes(torn.read_bytes() + b"half a record")  # its trainer was killed too
    server.holds_at = 14
    with vitdist("--jobs", "2", cwd=tmp_path) as first:
        # Both are in the middle of their second part: two at a time.
        until(lambda: [len(server.rows.get(name, [])) for name in ("first", "other")] == [14, 14])
        assert sorted(run.name for run in sync.find([str(tmp_path / "runs")])) == ["a", "b"]
        code, out, _ = done(runs[0].path)
        assert (code, out) == (0, f"{runs[0].path}: left to another sync\n")
        first.kill()
        for run in runs:
            os.kill(int((run.wandb / ".sync.lock").read_text()), signal.SIGKILL)
    server.holds_at = None
    code, out, error = done(tmp_path / "runs")
    assert (code, error) == (0, "")
    assert f"{runs[0].path}: uploaded, 16 rows in 2 parts {server.url}/me/vitdist/runs/first\n" in out
    assert out.endswith("2 runs: 2 uploaded\n")
    assert steps(server) == steps(server, "other") == EXPECTED
    assert server.artifacts == {"first-model": ("model", []), "other-model": ("model", [])}
    assert [end for end in server.ends if end["complete"]] == [
        {"complete": True, "exitcode": 0, "preempting": None}
    ] * 2
    assert done(tmp_path / "runs")[:2] == (0, "2 runs: 2 nothing to upload\n")
    assert steps(server) == EXPECTED
    assert not (runs[0].wandb / ".sync").exists()


def test_a_run_that_trains_is_followed_and_ended_once(server: fake_wandb.Server, written: Path, tmp_path: Path) -> None:
    run = copied(written, tmp_path / "live", parts=1)
    path = log(run)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    training(run, "running")
    said = tmp_path / "said"
    with open(said, "w") as file, vitdist(run.path, "--watch", "1", stdout=file) as process:
        until(lambda: server.rows.get("first"))
        so_far = len(server.rows["first"])
        assert 0 < so_far < 10
        with open(path, "ab") as rows:
            rows.write(whole[len(whole) // 2 :])
        training(run, "done")
        until(lambda: f"uploaded, {10 - so_far} rows in 1 part" in said.read_text())
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == (None, "")
    assert process.returncode == 0
    assert f"so far, still training, {so_far} rows in 1 part {server.url}" in said.read_text()
    assert upload.uploaded(path)
    assert steps(server) == EXPECTED[:10]
    assert [end["exitcode"] for end in server.ends if end["complete"]] == [75]


def test_what_the_server_refuses_is_not_marked(server: fake_wandb.Server, written: Path, tmp_path: Path) -> None:
    """W&B's own sync marks such a part, with exit code 0."""
    run = copied(written, tmp_path / "run", parts=1)
    server.refuses = {"file_stream": 403}
    code, _, error = done(run.path)
    assert (code, error.count("\n"), "k" * 40 in error) == (1, 1, False)
    assert error.startswith(f"error: {run.path}: 127.0.0.1:")
    assert "refuses the key or what is done with it (403): `wandb login`" in error
    assert not upload.uploaded(log(run))
    server.refuses = {}
    server.rows.clear()  # somebody took the run away there
    assert done(run.path)[0] == 0
    assert steps(server) == EXPECTED[:10]


def test_artifacts_that_are_refused_hold_up_no_row(server: fake_wandb.Server, written: Path, tmp_path: Path) -> None:
    run = copied(written, tmp_path / "run")
    for part in upload.folders(run, online=False)[:2]:
        shutil.rmtree(part)
    server.takes_artifacts = False
    code, out, error = done(run.path)
    assert (code, error) == (0, "")
    assert "uploaded, 10 rows in 1 part" in out
    assert "without its tables and artifacts: 127.0.0.1:" in out
    assert "no room for artifacts" in out
    assert upload.uploaded(log(run))
    assert [step for step, _ in steps(server)] == STEPS[20:]


def test_without_a_server_one_run_is_tried(wandb_home: pytest.MonkeyPatch, written: Path, tmp_path: Path) -> None:
    runs = [copied(written, tmp_path / name, parts=1) for name in ("a", "b", "c")]
    code, _, error = done("--jobs", "1", tmp_path)
    assert (code, error.count("\n")) == (1, 2)
    assert "error: " + str(runs[0].path) + ": no key for " in error
    assert f"error: {runs[1].path}, {runs[2].path}: not tried after that" in error
    wandb_home.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb_home.setenv("WANDB_API_KEY", "k" * 40)
    code, _, error = done(runs[0].path)
    assert code == 1
    assert "127.0.0.1:9 cannot be reached (connection refused): run it where there is a network" in error
    assert not any(upload.uploaded(log(run)) for run in runs)


def test_what_cannot_be_read_holds_up_nobody(server: fake_wandb.Server, written: Path, tmp_path: Path) -> None:
    """Nor does damage in the middle: the records around it are sent."""
    run = copied(written, tmp_path / "run", parts=2)
    content = bytearray(log(run).read_bytes())
    content[upload.BLOCK + 100] ^= 1
    log(run).write_bytes(content)
    empty = run.wandb / "offline-run-20200101_000000-first"
    garbage = run.wandb / "offline-run-20200101_000001-first"
    for folder in (empty, garbage):
        folder.mkdir()
    (garbage / "run-first.wandb").write_text("no records")
    code, out, error = done(run.path)
    assert (code, error) == (1, f"error: {run.path}: {garbage.name}: cannot be read: no file of W&B's rows\n")
    assert f"{empty.name} has nothing in it" in out
    assert "is damaged in 1 places: what lay there is left out" in out
    kept = [step for step, _ in steps(server)]
    assert kept[-10:] == STEPS[10:20]
    assert 7 <= len(kept[:-10]) < 10
    assert set(kept[:-10]) < set(STEPS[:10])


def test_what_was_online_is_uploaded_on_demand(server: fake_wandb.Server, written: Path, tmp_path: Path) -> None:
    """The first start lost its server after 4 rows, the next one had it again: the rest comes after that, once."""
    run = copied(written, tmp_path / "run", parts=2)
    for folder, begin in zip(upload.folders(run, online=False), (0, 4), strict=True):
        state = log(run).name + ".syncstate"
        (folder / state).write_text(json.dumps({"starting_step": begin, "starting_runtime": 0}))
        folder.rename(folder.with_name(folder.name.removeprefix("offline-")))
    there = STEPS[:4] + STEPS[10:20]
    server.rows["first"] = [{"train/global_step": step, "_step": i} for i, step in enumerate(there)]
    assert done(run.path)[:2] == (0, f"{run.path}: nothing to upload\n")
    code, out, _ = done(run.path, "--include-online")
    assert (code, "uploaded, 6 rows in 2 parts" in out) == (0, True)
    assert [step for step, _ in steps(server)] == there + STEPS[4:10]
    assert [step for _, step in steps(server)] == list(range(20))


# ---- without a server --------------------------------------------------------------------------


def test_a_sweep_is_its_points_which_lie_beside_it(tmp_path: Path) -> None:
    for name in ("a", "lr-00", "lr-01"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    (tmp_path / "runs" / "lr").mkdir()
    points = "points: [{folder: lr-00, overrides: [optim.lr=1]}, {folder: lr-01, overrides: [optim.lr=2]}]"
    (tmp_path / "runs" / "lr" / "sweep.yaml").write_text(points)
    assert [run.name for run in sync.find([str(tmp_path / "runs" / "lr")])] == ["lr-00", "lr-01"]
    found = sync.find([str(tmp_path / "runs"), str(tmp_path / "runs" / "a")])
    assert sorted(run.name for run in found) == ["a", "lr-00", "lr-01"]


def test_whether_it_trains(written: Path, tmp_path: Path) -> None:
    run = copied(written, tmp_path / "run", parts=1)
    training(run, "running")
    assert sync.look(run, online=False).training
    os.utime(log(run), (time.time() - 2 * sync.QUIET_S,) * 2)
    assert not sync.look(run, online=False).training
    os.utime(log(run))
    training(run, "stopped")
    assert not sync.look(run, online=False).training
    log(run).with_name(log(run).name + ".synced").write_text(str(log(run).stat().st_size))
    assert sync.look(run, online=False).parts == ()
    with open(log(run), "ab") as file:
        file.write(b"it went on")
    assert len(sync.look(run, online=False).parts) == 1


def test_records_survive_cuts_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "run-x.wandb"
    wanted = [bytes([i]) * length for i, length in enumerate((1, 40_000, 32_754, 0, 70_000, 3, 32_740, 9))]
    path.write_bytes(b":W&B\xe1\xbe\x00")
    rewritten(path, wanted)
    content = path.read_bytes()
    assert list(upload.records(path, len(content))) == wanted
    for size in range(0, len(content), 997):
        found = list(upload.records(path, size))
        assert found == wanted[: len(found)]
    for place in range(upload.HEAD, len(content), 1_501):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        found = list(upload.records(path, len(content)))
        assert [record for record in found if record is not None and record not in wanted] == []
        assert len(found) < len(wanted) + 2


@pytest.mark.parametrize(
    ("text", "reason", "others_too"),
    [
        ("No API key configured. Use `wandb login` to log in.", "no key for host", True),
        ("failed to upload: 401 Unauthorized url=http://host", r"refuses the key .*\(401\)", True),
        ("giving up after 3 attempt(s); while retrying: HTTP 502: {}", r"in trouble \(502\)", True),
        ("dial tcp: lookup host on 10.0.0.1:53: no such host", r"cannot be reached \(no such host\)", True),
        ("run first was previously created and deleted", "did not take it", False),
    ],
)
def test_a_failure_says_what_to_do(text: str, reason: str, others_too: bool) -> None:
    error = upload.explained(text, "host")
    assert isinstance(error, ConnectionError if others_too else ValueError)
    assert re.search(reason, str(error))
