"""--probe on a real SLURM, and containers, whose runtimes are stand-ins: neither is installed where these tests run."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.slurm.conftest import ROOT, read, slurm, submit_stand_in, told, until
from vitdist.rundir import RunDir

pytestmark = pytest.mark.slurm

APPTAINER = """\
#!/bin/bash
# As the real one: a process that stays, whose child is the command, with signals at their defaults.
printf '%s\\n' "$*" >> {folder}/started
while [ "$1" != {folder}/vit.sif ]; do shift; done
shift
trap : USR2 TERM
env --default-signal=USR2 "$@" &
child=$!
trap "kill -TERM $child" TERM
while kill -0 $child 2>/dev/null; do wait $child; code=$?; done
exit $code
"""
SRUN = """\
#!/bin/bash
# SLURM's own, without the flags that pyxis would add.
args=()
for word in "$@"; do
    case "$word" in --container-*) echo "$word" >> {folder}/started ;; *) args+=("$word") ;; esac
done
exec {srun} "${{args[@]}}"
"""


def test_a_probed_profile_is_one_that_slurm_takes(environment: dict[str, str], tmp_path: Path, recipe: Path) -> None:
    profile = tmp_path / "dev.yaml"
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), "--cluster", str(profile)]
    done = subprocess.run(
        [*command, "--probe"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "partition       dev" in done.stdout
    raw = yaml.safe_load(profile.read_text())
    assert (raw["partition"], raw["gpus_per_node"], raw["time"]) == ("dev", 0, "12:00:00")
    tried = [*command, "--config", str(recipe), "--nodes", "2", "--runs", str(tmp_path / "runs"), "--test-only"]
    done = subprocess.run(tried, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("runtime", ["pyxis", pytest.param("apptainer", marks=pytest.mark.full)])
def test_S1_a_run_in_a_container_saves_and_goes_on(
    environment: dict[str, str], tmp_path: Path, recipe: Path, runtime: str
) -> None:
    """USR2 reaches torchrun inside, which ignores it, and the trainers, which save."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (tmp_path / "vit.sif").touch()
    real = slurm(environment, "which", "srun").strip()
    for name, text in (("apptainer", APPTAINER), ("srun", SRUN)):
        (bin_ / name).write_text(text.format(folder=tmp_path, srun=real))
        (bin_ / name).chmod(0o755)
    profile = tmp_path / "mine.yaml"
    box = {"runtime": runtime, "image": "vit.sif", "python": sys.executable}
    profile.write_text(yaml.safe_dump({"gpus_per_node": 0, "cpus_per_task": 1, "container": box}))
    env = environment | {"PATH": f"{bin_}:{environment['PATH']}"}
    run = RunDir(tmp_path / "runs" / "boxed")
    job = submit_stand_in(env, tmp_path, recipe, "boxed", "--cluster", str(profile), until_asked=True)
    until(lambda: read(run.attempt(0).train).get("step", 0) > 3 or job.poll() is not None, "no step was done", 60)
    assert job.poll() is None, f"{job.communicate()}{told(run)}"
    job_id = read(run.attempt(0).job)["job_id"]
    slurm(environment, "scancel", "--signal", "USR2", job_id)
    until(
        lambda: slurm(environment, "squeue", "-h", "-j", job_id, "-t", "PD") or job.poll() is not None, "no requeue", 60
    )
    assert job.poll() is None, f"{job.communicate()}{told(run)}"
    first = read(run.attempt(0).train)
    assert (first["state"], first["reason"]) == ("stopped", "SIGUSR2"), told(run)
    slurm(environment, "scontrol", "update", f"JobId={job_id}", "StartTime=now")
    until(lambda: read(run.attempt(1).train).get("step", 0) > 0 or job.poll() is not None, "it does not go on", 60)
    assert read(run.attempt(1).train)["resumed_from"] == first["step"], told(run)
    slurm(environment, "scancel", job_id)
    job.communicate(timeout=60)
    started = (tmp_path / "started").read_text()
    assert f"{run.path}:{run.path}" in started if runtime == "pyxis" else f"--bind {run.path}" in started
