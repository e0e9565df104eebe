"""A real SLURM of four nodes, started once a session by slurm/dev-cluster, and what its tests share."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from vitdist import rundir
from vitdist.rundir import RunDir

ROOT = Path(__file__).parents[2]
INSTALLED = shutil.which("slurmctld", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
STAND_IN = "import sys; from launch import submit; sys.exit(submit.main(sys.argv[1:], launcher='standin'))"


@pytest.fixture(scope="session")
def cluster() -> Iterator[dict[str, str]]:
    """The environment of a user of a cluster of four nodes; skips where SLURM is not installed, but in CI."""
    if not INSTALLED and not os.environ.get("CI"):
        pytest.skip("SLURM is not installed: run 'sudo slurm/dev-cluster install' to enable these tests")
    folder = tempfile.mkdtemp(prefix="vitdist-", dir="/tmp")  # SLURM's paths must be short
    try:
        conf = dev_cluster(folder, "start", "4").removeprefix("export SLURM_CONF=")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "CUDA"))}
        yield clean | {"SLURM_CONF": conf.strip("'\""), "WANDB_MODE": "offline"}
    finally:
        dev_cluster(folder, "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def environment(cluster: dict[str, str]) -> Iterator[dict[str, str]]:
    """The same, for one test: what it leaves in the queue is cancelled, a node that it killed is started again."""
    yield cluster
    if slurm(cluster, "squeue", "-h", "-t", "PD,R,CG,S"):
        slurm(cluster, "scancel", "--user", slurm(cluster, "id", "-un").strip())
        until(lambda: not slurm(cluster, "squeue", "-h", "-t", "PD,R,CG,S"), "the queue is not empty", 60)
    dev_cluster(str(Path(cluster["SLURM_CONF"]).parent), "start", "4")


def dev_cluster(folder: str, *arguments: str) -> str:
    """The answer of slurm/dev-cluster."""
    command = [sys.executable, str(ROOT / "slurm" / "dev-cluster"), "--dir", folder, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def submit(environment: dict[str, str], cwd: Path, *arguments: str) -> "subprocess.Popen[str]":
    """The command as a user types it."""
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def stand_in(environment: dict[str, str], **orders: object) -> dict[str, str]:
    """The environment in which `launcher="standin"` is found; its trainers do what `orders` say."""
    return environment | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/launch", "STANDIN": json.dumps(orders)}


def submit_stand_in(
    environment: dict[str, str], cwd: Path, recipe: Path, name: str, *more: str, follow: bool = True, **orders: object
) -> "subprocess.Popen[str]":
    """Two nodes with trainers that only count: all but the training is real. `more`: of the command line."""
    arguments = ["--nodes", "2", "--config", str(recipe), "--name", name, *["--follow"][: int(follow)], *more]
    command = [sys.executable, "-c", STAND_IN, *arguments]
    env = stand_in(environment, **orders)
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    """Wait for `condition`; fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s: {what}"
        time.sleep(0.1)


def start_now(environment: dict[str, str], job_id: str) -> None:
    """Start a requeued job without SLURM's delay, but not in the second of its requeue.

    slurmd takes credentials of that second for revoked ones: the controller then ends the job as failed.
    """
    until(lambda: slurm(environment, "squeue", "-h", "-j", job_id, "-t", "PD"), f"job {job_id} was not requeued", 60)
    answer = slurm(environment, "scontrol", "show", "job", job_id, "-o")
    requeued = datetime.fromisoformat(re.findall(r"SubmitTime=(\S+)", answer)[0])
    until(lambda: datetime.now() > requeued + timedelta(seconds=2), "the clock stands", 30)
    slurm(environment, "scontrol", "update", f"JobId={job_id}", "StartTime=now")


def told(run: RunDir) -> str:
    """Everything that the jobs of a run have written, for a failing test."""
    logs = [*run.path.glob("attempts/*/logs/*/*.log"), *run.path.glob("submitit/*_log.out")]
    return "\n".join(f"--- {log}\n{log.read_text()[-2000:]}" for log in sorted(logs))


def read(path: Path) -> dict[str, Any]:
    """A record, or {} where there is none yet."""
    return rundir.read_json(path) or {}


def slurm(environment: dict[str, str], *command: str) -> str:
    """The answer of a command that must succeed."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True).stdout
