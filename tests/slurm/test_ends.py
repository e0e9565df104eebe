"""However a start ends on a real SLURM: what is saved, whether the job starts again, where, and what is said.

The trainers are stand-ins that only count; the signals, kills, limits and requeues are SLURM's own.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.conftest import read, slurm, start_now, submit_stand_in, told, until
from vitdist.rundir import RunDir

pytestmark = pytest.mark.slurm
ENDED = "PD,R,CG,S"


def trains(run: RunDir, job: "subprocess.Popen[str]", attempt: int = 0) -> str:
    """Wait until the trainers of a start have made some steps; returns the job's id."""
    number = run.attempt(attempt)

    def steps() -> int:
        record = read(number.train)
        return int(record.get("step", 0)) - int(record.get("resumed_from") or 0)

    until(lambda: steps() > 3 or job.poll() is not None, "no step was done", 90)
    assert job.poll() is None, f"{job.communicate()}{told(run)}"
    return str(read(number.job)["job_id"])


def goes_on(environment: dict[str, str], run: RunDir, job: "subprocess.Popen[str]", job_id: str, attempt: int) -> int:
    """Wait for the requeue, let the start `attempt` begin at once; returns the step that it goes on from."""
    pending = ("squeue", "-h", "-j", job_id, "-t", "PD")
    begun = run.attempt(attempt).job
    until(
        lambda: slurm(environment, *pending) or begun.exists() or job.poll() is not None,
        f"it was not requeued: {slurm(environment, 'squeue', '-t', 'all')}",
        90,
    )
    assert job.poll() is None, f"{job.communicate()}{told(run)}"
    if not begun.exists():  # SLURM would wait for a while, but not after a node's end
        start_now(environment, job_id)
    trains(run, job, attempt)
    return int(read(run.attempt(attempt).train)["resumed_from"] or 0)


def cancel(environment: dict[str, str], job: "subprocess.Popen[str]", job_id: str) -> None:
    slurm(environment, "scancel", job_id)
    job.communicate(timeout=60)


def trainers(run: RunDir, node: int | None = None) -> list[int]:
    """The processes of a run's trainers; those of one node."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_text().split("\0")
            environment = (path.parent / "environ").read_text(errors="replace").split("\0")
        except OSError:  # it ended meanwhile
            continue
        if "worker" in command and str(run.path) in command and (node is None or f"GROUP_RANK={node}" in environment):
            found.append(int(path.parent.name))
    return found


def test_L7_a_cancelled_run_saves_and_is_not_requeued(
    environment: dict[str, str], tmp_path: Path, recipe: Path
) -> None:
    run = RunDir(tmp_path / "runs" / "cancelled")
    job = submit_stand_in(environment, tmp_path, recipe, "cancelled", until_asked=True)
    job_id = trains(run, job)
    slurm(environment, "scancel", job_id)
    out, error = job.communicate(timeout=60)
    assert job.returncode != 0, f"{out}{error}"
    until(lambda: not slurm(environment, "squeue", "-h", "-j", job_id, "-t", ENDED), "the job is gone", 60)
    stopped = read(run.attempt(0).train)
    assert (stopped["state"], stopped["reason"]) == ("stopped", "SIGTERM")
    assert (run.checkpoints / "step").read_text() == str(stopped["step"])
    assert [attempt.number for attempt in run.attempts()] == [0]
    assert f"stopped at step {stopped['step']}" in out + error
    assert "goes on" in out + error, f"{out}{error}"


def test_S3_signals_upon_signals_save_once_and_requeue_once(
    environment: dict[str, str], tmp_path: Path, recipe: Path
) -> None:
    """USR2 three times, while the trainers save: one requeue, which goes on from what was saved."""
    run = RunDir(tmp_path / "runs" / "twice")
    job = submit_stand_in(environment, tmp_path, recipe, "twice", until_asked=True)
    job_id = trains(run, job)
    for _ in range(3):
        slurm(environment, "scancel", "--signal", "USR2", job_id)
    assert goes_on(environment, run, job, job_id, 1) == read(run.attempt(0).train)["step"]
    assert read(run.attempt(0).job)["state"] == "requeued"
    cancel(environment, job, job_id)
    assert [attempt.number for attempt in run.attempts()] == [0, 1]


def test_S4_a_preempted_run_makes_room_and_goes_on(environment: dict[str, str], tmp_path: Path, recipe: Path) -> None:
    run = RunDir(tmp_path / "runs" / "preempted")
    job = submit_stand_in(environment, tmp_path, recipe, "preempted", until_asked=True)
    job_id = trains(run, job)
    done = tmp_path / "urgent"
    urgent = ("--partition=high", "--exclusive", "--nodes=4", "--output=/dev/null", f"--wrap=touch {done}")
    slurm(environment, "sbatch", *urgent)
    until(lambda: done.exists() or job.poll() is not None, "the run does not make room", 60)
    stopped = read(run.attempt(0).train)
    assert (stopped["state"], stopped["reason"]) == ("stopped", "SIGUSR2")
    assert goes_on(environment, run, job, job_id, 1) == stopped["step"]
    cancel(environment, job, job_id)
    assert [attempt.number for attempt in run.attempts()] == [0, 1]


def test_S1_at_its_time_limit_a_run_saves_and_goes_on(
    environment: dict[str, str], tmp_path: Path, recipe: Path
) -> None:
    run = RunDir(tmp_path / "runs" / "limit")
    job = submit_stand_in(environment, tmp_path, recipe, "limit", "--time", "5", until_asked=True)
    job_id = trains(run, job)
    # As if it had run for so long: SLURM warns 120 s before the end that it now has.
    slurm(environment, "scontrol", "update", f"JobId={job_id}", "TimeLimit=2")
    assert goes_on(environment, run, job, job_id, 1) == read(run.attempt(0).train)["step"]
    assert read(run.attempt(0).train)["reason"] == "SIGUSR2"
    cancel(environment, job, job_id)


def test_R5_a_killed_rank_costs_a_start(environment: dict[str, str], tmp_path: Path, recipe: Path) -> None:
    run = RunDir(tmp_path / "runs" / "killed")
    job = submit_stand_in(environment, tmp_path, recipe, "killed", until_asked=True)
    job_id = trains(run, job)
    (victim,) = trainers(run, 1)
    os.kill(victim, signal.SIGKILL)
    assert goes_on(environment, run, job, job_id, 1) == 0  # it had not saved
    record = read(run.attempt(0).job)
    assert record["state"] == "requeued"
    assert "rank 1 was killed by SIGKILL" in record["cause"]
    assert record["decision"] == "crash 1 of 3 without a new checkpoint"
    cancel(environment, job, job_id)


def test_R10_a_crash_loop_is_ended_at_three(environment: dict[str, str], tmp_path: Path, recipe: Path) -> None:
    run = RunDir(tmp_path / "runs" / "loop")
    fault = {"rank": 1, "message": "no such thing"}
    job = submit_stand_in(environment, tmp_path, recipe, "loop", fail=fault)
    until(lambda: (run.attempt(0).job).exists() or job.poll() is not None, "it did not start", 60)
    job_id = read(run.attempt(0).job)["job_id"]
    for attempt in (0, 1):
        ended = run.attempt(attempt).job
        until(lambda ended=ended: read(ended).get("state") == "requeued", f"start {attempt} was not requeued", 90)  # type: ignore[misc]
        start_now(environment, job_id)
    out, error = job.communicate(timeout=90)
    assert job.returncode == 1
    assert "ValueError: no such thing" in error, f"{out}{error}"
    last = read(run.attempt(2).job)
    assert (last["state"], last["decision"]) == ("failed", "3 starts in a row have failed without a new checkpoint")
    assert [attempt.number for attempt in run.attempts()] == [0, 1, 2]


@pytest.mark.parametrize("node", [0, pytest.param(1, marks=pytest.mark.full)])
def test_R7_a_nodes_own_job_that_is_killed_costs_a_start(
    environment: dict[str, str], tmp_path: Path, recipe: Path, node: int
) -> None:
    """The process that would have decided what follows, also the first node's: then the batch script does."""
    run = RunDir(tmp_path / "runs" / "orphan")
    job = submit_stand_in(environment, tmp_path, recipe, "orphan", until_asked=True)
    job_id = trains(run, job)
    host = read(run.attempt(0).job)["hosts"][node]
    os.kill(node_job(run, host), signal.SIGKILL)
    # This cluster has no cgroups that would end what a killed process leaves: it saves first, and holds the run's lock.
    until(lambda: not trainers(run) or run.attempt(1).job.exists(), "its trainers live on", 60)
    from_step = goes_on(environment, run, job, job_id, 1)
    saved = run.checkpoints / "step"
    assert from_step == (int(saved.read_text()) if saved.exists() else 0)
    record = read(run.attempt(0).job)
    assert (record["state"], record["again"]) == ("requeued", True), told(run)
    assert node or "the job of the first node" in record["cause"]
    cancel(environment, job, job_id)


def node_job(run: RunDir, host: str) -> int:
    """The process that submitit runs on a node, a child of slurmstepd."""
    (found,) = (
        pid
        for pid, command, variables in processes()
        if "submitit.core._submit" in command
        and str(run.submitit) in command
        and f"SLURMD_NODENAME={host}" in variables
        and "SLURM_STEP_ID=0" in variables
    )
    return found


def processes() -> Iterator[tuple[int, list[str], list[str]]]:
    """(number, command, environment) of all there are."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            texts = [(entry / name).read_text(errors="replace").split("\0") for name in ("cmdline", "environ")]
        except OSError:  # it ended meanwhile
            continue
        yield int(entry.name), texts[0], texts[1]


def test_R7_a_node_that_dies_costs_a_start_and_leaves_no_zombie(
    environment: dict[str, str], tmp_path: Path, recipe: Path
) -> None:
    run = RunDir(tmp_path / "runs" / "dead")
    job = submit_stand_in(environment, tmp_path, recipe, "dead", until_asked=True)
    job_id = trains(run, job)
    first = trainers(run)
    host = read(run.attempt(0).job)["hosts"][1]
    kill_node(environment, host, run)
    # SLURM gives a node up after SlurmdTimeout (20 s). Mostly srun misses its step before that, and ends the others,
    # which save.
    from_step = goes_on(environment, run, job, job_id, 1)
    saved = run.checkpoints / "step"
    assert from_step == (int(saved.read_text()) if saved.exists() else 0)
    assert not set(first) & set(trainers(run))
    assert host not in read(run.attempt(1).job)["hosts"]
    assert read(run.attempt(1).job)["state"] == "running"
    cancel(environment, job, job_id)


def kill_node(environment: dict[str, str], host: str, run: RunDir) -> None:
    """Kill a node's daemon and all that it has started, as a power cut would."""
    folder = str(Path(environment["SLURM_CONF"]).parent)
    dead = set()
    for pid, command, variables in processes():
        with contextlib.suppress(OSError):  # it ended meanwhile
            daemon = command[0] == "slurmd" and host in command and os.readlink(f"/proc/{pid}/cwd") == folder
            if daemon or (f"SLURMD_NODENAME={host}" in variables and str(run.path) in "\0".join(variables + command)):
                dead.add(pid)
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                # slurmstepd writes its title over its environment.
                if Path(f"/proc/{parent}/cmdline").read_text().startswith("slurmstepd: "):
                    dead.add(parent)
    assert len(dead) > 2
    for pid in dead:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_S6_a_limit_of_starts_ends_a_run(environment: dict[str, str], tmp_path: Path, recipe: Path) -> None:
    run = RunDir(tmp_path / "runs" / "limited")
    profile = tmp_path / "mine.yaml"
    profile.write_text("max_starts: 1\n")
    more = ("--cluster", str(profile))
    job = submit_stand_in(environment, tmp_path, recipe, "limited", *more, until_asked=True)
    job_id = trains(run, job)
    slurm(environment, "scancel", "--signal", "USR2", job_id)
    out, error = job.communicate(timeout=60)
    assert "stopped at step" in out + error, f"{out}{error}{told(run)}"
    assert read(run.attempt(0).job)["decision"] == "the profile allows 1 starts (max_starts)"
    assert not slurm(environment, "squeue", "-h", "-j", job_id, "-t", "PD")


def test_S7_a_refused_requeue_says_how_to_go_on(environment: dict[str, str], tmp_path: Path, recipe: Path) -> None:
    run = RunDir(tmp_path / "runs" / "refused")
    job = submit_stand_in(environment, tmp_path, recipe, "refused", until_asked=True)
    job_id = trains(run, job)
    slurm(environment, "scontrol", "update", f"JobId={job_id}", "Requeue=0")
    slurm(environment, "scancel", "--signal", "USR2", job_id)
    out, error = job.communicate(timeout=60)
    record = read(run.attempt(0).job)
    assert record["state"] == "stopped", f"{out}{error}{told(run)}"
    assert record["decision"].startswith("SLURM refused: ")
    assert "goes on" in out + error
    assert (run.checkpoints / "step").exists()


NVIDIA_SMI = """#!/bin/sh
case $SLURMD_NODENAME in node2) echo "Unable to determine the device handle: GPU is lost" >&2; exit 15;; esac
case $1 in --query-gpu*) echo "NVIDIA H100, 81559, 4, 0";; *) echo "no";; esac
"""


def test_a_node_with_a_bad_gpu_is_named_and_left_out(environment: dict[str, str], tmp_path: Path, recipe: Path) -> None:
    run = RunDir(tmp_path / "runs" / "bad")
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    profile = tmp_path / "gpus.yaml"
    profile.write_text("gpus_per_node: 1\ngpu_request: none\ncpus_per_task: 2\n")
    with_tool = environment | {"PATH": f"{tool.parent}:{environment['PATH']}"}
    more = ("--cluster", str(profile))
    job = submit_stand_in(with_tool, tmp_path, recipe, "bad", *more, until_asked=True)
    until(lambda: read(run.attempt(0).job).get("ended") or job.poll() is not None, "the check did not end it", 60)
    record = read(run.attempt(0).job)
    assert record["state"] == "requeued", f"{record}{told(run)}"
    assert "node2: nvidia-smi: Unable to determine the device handle: GPU is lost" in record["cause"]
    assert record["exclude"] == ["node2"]
    job_id = record["job_id"]
    assert goes_on(environment, run, job, job_id, 1) == 0
    assert "node2" not in read(run.attempt(1).job)["hosts"]
    cancel(environment, job, job_id)
