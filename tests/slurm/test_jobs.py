"""launch/jobs.py on the real SLURM, with trainers that only count: list, logs over a requeue, stop, resume, cancel."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import read, slurm, stand_in, submit_stand_in, told, until
from vitdist import manifest, rundir
from vitdist.rundir import RunDir

pytestmark = pytest.mark.slurm
STAND_IN = "import sys; from launch import jobs; sys.exit(jobs.main(sys.argv[1:], launcher='standin'))"


def jobs(environment: dict[str, str], cwd: Path, *arguments: str, **orders: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", STAND_IN, *arguments]
    env = stand_in(environment, **orders)
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(environment: dict[str, str], cwd: Path, *arguments: str, **orders: object) -> str:
    """stdout and stderr of a command that ends with 0."""
    process = jobs(environment, cwd, *arguments, **orders)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, out + error
    assert "Traceback" not in error
    return out + error


def states(environment: dict[str, str], cwd: Path) -> dict[str, dict[str, Any]]:
    process = jobs(environment, cwd, "--json")
    out, _ = process.communicate(timeout=60)
    return {each["name"]: each for each in json.loads(out)}


def sent(environment: dict[str, str], cwd: Path, recipe: Path, name: str, *more: str, **orders: object) -> RunDir:
    """A run that was submitted."""
    submission = submit_stand_in(environment, cwd, recipe, name, *more, follow=False, **orders)
    out, error = submission.communicate(timeout=60)
    assert submission.returncode == 0, out + error
    return RunDir(cwd / "runs" / name)


def steps(run: RunDir, attempt: int) -> int:
    return int(read(run.attempt(attempt).train).get("step", 0))


def test_L6_L7_list_logs_stop_and_resume_over_a_requeue(
    environment: dict[str, str], tmp_path: Path, recipe: Path
) -> None:
    run = sent(environment, tmp_path, recipe, "one", until_asked=True)
    blocked = sent(environment, tmp_path, recipe, "two", "--nodes", "4", until_asked=True)
    until(lambda: steps(run, 0) > 3, "no step was done", 60)
    until(lambda: "Resources" in slurm(environment, "squeue", "-h", "-t", "PD", "-o", "%r"), "no reason yet", 30)
    found = states(environment, tmp_path)
    assert (found["one"]["state"], found["one"]["nodes"]) == ("running", "node[1-2]"), told(run)
    assert found["two"]["state"] == "pending"
    assert "waits for nodes to become free" in found["two"]["note"]
    assert "taken out of the queue" in said(environment, tmp_path, "two", "stop")
    assert states(environment, tmp_path)["two"]["state"] == "stopped"
    assert not blocked.attempts()

    watcher = jobs(environment, tmp_path, "one", "logs", "-f", "--rank", "all")
    job = read(run.attempt(0).job)["job_id"]
    slurm(environment, "scancel", "--signal", "USR2", job)
    until(lambda: slurm(environment, "squeue", "-h", "-j", job, "-t", "PD"), "it was not requeued", 60)
    saved = steps(run, 0)
    again = states(environment, tmp_path)["one"]
    assert (again["state"], again["step"]) == ("pending", saved)
    assert watcher.poll() is None
    slurm(environment, "scontrol", "update", f"JobId={job}", "StartTime=now")
    until(lambda: steps(run, 1) > saved, "it does not go on", 60)
    out = said(environment, tmp_path, "one", "stop", "--wait")
    assert f"job {job} is asked to save and to end" in out
    stopped = read(run.attempt(1).train)
    assert stopped["state"] == "stopped"
    assert f"one is stopped at step {stopped['step']}/" in out
    until(lambda: not slurm(environment, "squeue", "-h", "-j", job, "-t", "PD,R,CG"), "the job is gone", 30)
    assert [attempt.number for attempt in run.attempts()] == [0, 1]
    assert read(run.attempt(1).job)["state"] == "stopped"
    out, error = watcher.communicate(timeout=30)
    assert watcher.returncode == rundir.EXIT_STOPPED, out + error
    assert out.count("rank 0: here am I") == out.count("rank 1: here am I") == 2
    assert f"--- attempt 0 ended at step {saved}, stopped by SIGUSR2: SLURM starts it again" in error
    assert f"--- attempt 1 on node[1-2] goes on from step {saved}" in error

    said(environment, tmp_path, "one", "resume", "--yes", steps=stopped["step"] + 3)
    until(lambda: read(run.attempt(2).job).get("state") == "done", "the resumed run does not end", 60)
    assert read(run.attempt(2).train)["resumed_from"] == stopped["step"]
    done = states(environment, tmp_path)["one"]
    assert (done["state"], done["note"]) == ("done", "top-1 96.00 %")
    assert said(environment, tmp_path, "one", "why").startswith("one: done, and well at step")


def test_cancel_ends_at_once_and_names_the_checkpoint(
    environment: dict[str, str], tmp_path: Path, recipe: Path
) -> None:
    run = sent(environment, tmp_path, recipe, "x", until_asked=True)
    until(lambda: steps(run, 0) > 3, "no step was done", 60)
    whole(run, 2)
    out = said(environment, tmp_path, "x", "cancel")
    assert "x: kept: step-00000002, " in out
    job = read(run.attempt(0).job)["job_id"]
    until(lambda: not slurm(environment, "squeue", "-h", "-j", job, "-t", "PD,R,CG"), "the job is gone", 60)
    assert states(environment, tmp_path)["x"]["state"] in ("stopped", "cancelled"), told(run)
    assert [attempt.number for attempt in run.attempts()] == [0]
    assert "resume  # goes on from step 2" in said(environment, tmp_path, "x")


def whole(run: RunDir, step: int) -> None:
    """A checkpoint of one rank, as a trainer leaves it."""
    folder = run.checkpoints / manifest.name_of(step)
    folder.mkdir(parents=True)
    (folder / "rank-0.safetensors").write_bytes(b"weights")
    files = {"rank-0.safetensors": {"bytes": 7, "sha256": manifest.sha256(folder / "rank-0.safetensors")}}
    identity = {"optimizer": "", "global_batch": 8, "model": {}, "classes": [], "data": "", "groups": [], "rest": {}}
    counters = {"steps": step, "skipped": 0, "optimizer": {}, "loss_scaler": {}}
    record = {
        "format": manifest.FORMAT,
        "step": step,
        "attempt": 0,
        "saved": rundir.now(),
        "world": 1,
        "zero": 2,
        "precision": "fp32",
        "average": False,
        "counters": counters,
        "position": {"epoch": 0.5},
        "wandb": None,
        "identity": identity,
        "settings": {},
        "settings_digest": "",
        "versions": {},
        "files": files,
    }
    rundir.publish_json(folder / "manifest.json", record | {"digest": manifest.own_digest(record)})


def test_a_point_of_a_sweep_is_stopped_while_others_wait(
    environment: dict[str, str], tmp_path: Path, recipe: Path
) -> None:
    sent(environment, tmp_path, recipe, "lr", "--sweep", "optim.lr=1e-3,2e-3,3e-3", until_asked=True)
    points = [RunDir(tmp_path / "runs" / f"lr-0{number}") for number in range(3)]
    until(lambda: all(steps(point, 0) > 3 for point in points[:2]), "no step was done", 60)
    out = said(environment, tmp_path, "lr-01", "stop", "--wait")
    assert "lr-01 is stopped at step" in out
    found = states(environment, tmp_path)
    assert found["lr-00"]["state"] == "running", found
    assert found["lr-02"]["state"] in ("pending", "starting", "running")
    assert "is cancelled" in said(environment, tmp_path, "lr", "cancel")
    until(lambda: not slurm(environment, "squeue", "-h", "-t", "PD,R,CG"), "the sweep is gone", 60)


def test_why_of_a_crash_loop_names_the_first_rank(environment: dict[str, str], tmp_path: Path, recipe: Path) -> None:
    run = sent(environment, tmp_path, recipe, "bad", fail={"rank": 1, "message": "no such class"})
    until(lambda: read(run.attempt(0).job).get("state") in ("requeued", "failed"), "it does not fail", 60)
    out = said(environment, tmp_path, "bad", "why")
    assert "first       rank 1: ValueError: no such class" in out, out
    assert "followed    rank 0: RuntimeError: Connection closed by peer" in out
    assert "Connection closed" not in out.split("followed")[0]
