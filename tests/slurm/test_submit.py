"""The command on the real SLURM: sweeps, runs after runs, allocations, odd places, secrets; trainers only count."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import sweep
from tests.slurm.conftest import ROOT, STAND_IN, read, slurm, stand_in, start_now, submit_stand_in, told, until
from vitdist import config, rundir
from vitdist.rundir import RunDir

pytestmark = pytest.mark.slurm
Environment = dict[str, str]


def state(run: RunDir) -> str:
    return str(rundir.state(run)["state"])


def test_a_sweep_is_one_array_and_a_folder_a_point(environment: Environment, tmp_path: Path, recipe: Path) -> None:
    lists = ["--nodes", "1", "--sweep", "optim.lr=1e-4,3e-4", "optim.betas=[0.9, 0.95],[0.9, 0.99]"]
    job = submit_stand_in(environment, tmp_path, recipe, "sw", *lists, steps=8)
    out, error = job.communicate(timeout=60)
    home = RunDir(tmp_path / "runs" / "sw")
    known = sweep.read(home.path)
    assert known
    points = [RunDir(tmp_path / "runs" / point.name) for point in known.points]
    assert job.returncode == 0, out + error + "".join(map(told, points))
    assert [run.name for run in points] == ["sw-00", "sw-01", "sw-02", "sw-03"]
    assert [state(run) for run in points] == ["done"] * 4
    array = (home.path / "slurm_job").read_text().strip()
    for number, run in enumerate(points):
        assert (run.path / "slurm_job").read_text() == f"{array}_{number}\n"
        assert read(run.attempt(0).job)["job_id"] == f"{array}_{number}"
        assert (run.submitit / f"{array}_{number}_0_log.out").exists()
    table = out[out.index("run    optim.lr") :].splitlines()
    assert [line.split()[0] for line in table[1:]] == [run.name for run in points]
    assert "[0.9, 0.99]" in table[2]
    assert {config.load(run.config).tracking.group for run in points} == {"sw"}


def test_X1_a_run_from_an_odd_place_keeps_its_code_and_no_secret(
    environment: Environment, tmp_path: Path, recipe: Path
) -> None:
    """From a checkout and a folder with blanks and umlauts, by a relative path, after another job; edited meanwhile."""
    place = tmp_path / "Würfel & Söhne"
    checkout, here = place / "the code", place / "hier"
    here.mkdir(parents=True)
    for part in ("launch", "vitdist", "configs", "slurm"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    (place / "rezept.yaml").write_text(recipe.read_text())
    canaries = {name: f"canary{number}canary" for number, name in enumerate(SECRETS)}
    git = ["git", "-C", str(checkout), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True, timeout=60)
    remote = f"https://user:{canaries['REMOTE']}@example.com/x.git"
    subprocess.run([*git, "remote", "add", "origin", remote], check=True, timeout=60)
    for name in (".env", "configs/.env", "slurm/prod.env", "slurm/site.key"):
        (checkout / name).write_text(f"HF_TOKEN={canaries['FILE']}\n")
    (checkout / "launch" / "job.py").open("a").write("# uncommitted work\n")
    blocker = slurm(environment, "sbatch", "--parsable", "-o", "/dev/null", f"--wrap={wait_for(tmp_path / 'go')}")
    env = stand_in(environment | canaries, steps=5) | {"PYTHONPATH": f"{checkout}:{ROOT}/tests/launch"}
    arguments = ["--nodes", "2", "--config", "../rezept.yaml", "--name", "x", "--after", blocker.strip(), "--follow"]
    command = [sys.executable, "-c", STAND_IN, *arguments]
    job = subprocess.Popen(command, cwd=here, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = RunDir(here / "runs" / "x")
    until((run.path / "slurm_job").exists, "it was not submitted", 30)
    job_id = (run.path / "slurm_job").read_text().strip()
    assert "Dependency" in slurm(environment, "squeue", "-h", "-j", job_id, "-o", "%r")
    for name in ("launch/job.py", "vitdist/rundir.py"):
        (checkout / name).write_text("raise SystemExit('edited after the submission')\n")
    (tmp_path / "go").touch()
    out, error = job.communicate(timeout=90)
    assert job.returncode == 0, out + error + told(run)
    assert state(run) == "done"
    assert str(run.code) in run.attempt(0).rank_log(1, 1).read_text()
    assert "# uncommitted work" in (run.code / "launch" / "job.py").read_text()
    assert "+# uncommitted work" in run.patch.read_text()
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".pkl" for path in files)
    for path in files:
        found = [name for name, value in canaries.items() if value.encode() in path.read_bytes()]
        assert not found, f"{path} holds {found}"
    assert not [name for name, value in canaries.items() if value in out + error]


SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "REMOTE", "FILE")


def wait_for(path: Path) -> str:
    return f"until [ -e '{path}' ]; do sleep 0.1; done"


def test_what_waits_for_a_run_that_fails_is_taken_away(environment: Environment, tmp_path: Path, recipe: Path) -> None:
    first = submit_stand_in(
        environment, tmp_path, recipe, "first", "--nodes", "1", follow=False, refuse="no such classes"
    )
    assert first.wait(30) == 0
    job = submit_stand_in(environment, tmp_path, recipe, "second", "--nodes", "1", "--after", "first", follow=False)
    out, error = job.communicate(timeout=30)
    if job.returncode == 0:  # else the first has failed by now, and that was told
        assert "starts      after job" in out
        second = (tmp_path / "runs" / "second" / "slurm_job").read_text().strip()
        until(lambda: "CANCELLED" in slurm(environment, "squeue", "-h", "-t", "all", "-j", second, "-o", "%T"), "left")
    else:
        assert "--after first: first is" in error
    job = submit_stand_in(environment, tmp_path, recipe, "third", "--after", "first", follow=False)
    _, error = job.communicate(timeout=30)
    assert job.returncode == rundir.EXIT_REFUSED
    assert re.search(r"error: --after first: first is \w+: first --resume first", error), error
    assert not (tmp_path / "runs" / "third").exists()


def test_inside_of_an_allocation_a_run_takes_its_nodes(environment: Environment, tmp_path: Path, recipe: Path) -> None:
    """Two of three nodes; Ctrl-C saves and asks for no other start; the next start goes on to the end."""
    command = [sys.executable, "-c", STAND_IN, "--config", str(recipe), "--name", "here", "--nodes", "2"]
    script = (
        f"import json, os, subprocess, sys; env = dict(os.environ); job = subprocess.Popen({command!r}); "
        "open('pid', 'w').write(str(job.pid)); first = job.wait(); "
        f"env['STANDIN'] = json.dumps({{'steps': 1}}); second = subprocess.call({command!r}, env=env); "
        "sys.exit([first, second] != [75, 0])"
    )
    env = stand_in(environment, until_asked=True)
    salloc = subprocess.Popen(
        ["salloc", "-N3", sys.executable, "-c", script],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    run = RunDir(tmp_path / "runs" / "here")
    until(lambda: read(run.attempt(0).train).get("step", 0) > 3 or salloc.poll() is not None, "no step was done", 60)
    assert salloc.poll() is None, salloc.communicate()[0]
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGINT)
    out, _ = salloc.communicate(timeout=60)
    assert salloc.returncode == 0, out + told(run)
    assert "stopping: the run saves a checkpoint first" in out
    stopped, done = read(run.attempt(0).train), read(run.attempt(1).train)
    assert (stopped["state"], done["state"]) == ("stopped", "done")
    assert done["resumed_from"] == stopped["step"]
    first = read(run.attempt(0).job)
    assert (first["nodes"], first["hosts"], first["state"]) == (2, ["node1", "node2"], "stopped")
    assert "#SBATCH" not in run.submit.read_text()


def test_two_runs_at_once_on_the_same_hosts(environment: Environment, tmp_path: Path, recipe: Path) -> None:
    profile = tmp_path / "half.yaml"
    profile.write_text("{gpus_per_node: 0, cpus_per_task: 1, mem_gb: default}\n")
    more = ("--cluster", str(profile), "--exclude", "node[3-4]")
    jobs = [
        submit_stand_in(environment, tmp_path, recipe, name, *more, until_asked=True, follow=False)
        for name in ("left", "right")
    ]
    runs = [RunDir(tmp_path / "runs" / name) for name in ("left", "right")]
    assert [job.wait(60) for job in jobs] == [0, 0]
    until(lambda: all(read(run.attempt(0).train).get("step", 0) > 3 for run in runs), "not both train", 60)
    launched = [read(run.attempt(0).job) for run in runs]
    assert launched[0]["hosts"] == launched[1]["hosts"] == ["node1", "node2"]
    assert launched[0]["port"] != launched[1]["port"]


def test_test_only_asks_and_queues_nothing(environment: Environment, tmp_path: Path, recipe: Path) -> None:
    ask = ("--test-only", "--exclude", "node1", "--sweep", "optim.lr=1e-4,3e-4")
    job = submit_stand_in(environment, tmp_path, recipe, "x", *ask, follow=False)
    out, error = job.communicate(timeout=30)
    assert job.returncode == 0, error
    assert re.search(r"starts      (at once|about \d{4}-).* on node\[2-3\]", out), out
    assert "x-01: optim.lr=3e-4" in error
    job = submit_stand_in(environment, tmp_path, recipe, "x", "--test-only", "--exclude", "node9", follow=False)
    out, error = job.communicate(timeout=30)
    assert job.returncode == rundir.EXIT_REFUSED, out + error
    assert "not known: " in out
    assert not (tmp_path / "runs").exists()
    assert not slurm(environment, "squeue", "-h")


def listed(environment: Environment, folder: Path) -> list[dict[str, Any]]:
    """What launch/jobs.py says of the runs of a folder."""
    command = [sys.executable, str(ROOT / "launch" / "jobs.py"), "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return list(json.loads(done.stdout))


def test_S1_train_sbatch_saves_requeues_and_goes_on(environment: Environment, tmp_path: Path, recipe: Path) -> None:
    """Without submitit: the script for those who have their own ways."""
    env = stand_in(environment, until_asked=True) | {"PYTHON": sys.executable, "LAUNCHER": "standin"}
    script = ["sbatch", "--parsable", "--nodes", "2", str(ROOT / "slurm" / "train.sbatch"), "runs/x"]
    run = RunDir(tmp_path / "runs" / "x")

    def send(*more: str) -> str:
        done = subprocess.run([*script, *more], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    bad = send(str(recipe), "optim.ler=1")
    job_id = send(str(recipe), "optim.lr=2e-3")
    until(lambda: read(run.attempt(0).train).get("step", 0) > 3, "no step was done", 60)
    slurm(environment, "scancel", "--signal", "USR2", job_id)
    start_now(environment, job_id)
    until(lambda: read(run.attempt(1).train).get("step", 0) > 0, "it does not go on", 60)
    first, second = read(run.attempt(0).train), read(run.attempt(1).train)
    assert (first["state"], first["reason"], second["resumed_from"]) == ("stopped", "SIGUSR2", first["step"])
    assert "lr: 0.002" in run.config.read_text()
    assert (read(run.attempt(0).job)["state"], read(run.attempt(0).job)["nodes"]) == ("requeued", 2)
    assert [(told["state"], told["job"], told["attempt"]) for told in listed(environment, tmp_path)] == [
        ("running", job_id, 1)
    ]
    slurm(environment, "scancel", job_id)
    until(lambda: read(run.attempt(1).train)["state"] == "stopped", "it does not save", 60)
    until(lambda: read(run.attempt(1).job)["state"] == "stopped", "its end is not recorded", 60)
    assert [told["state"] for told in listed(environment, tmp_path)] == ["stopped"]
    # The same job id's next one, which launch/jobs.py asks to stop: saved, and not requeued for its USR2.
    job_id = send()
    until(lambda: read(run.attempt(2).train).get("step", 0) > read(run.attempt(1).train)["step"] + 2, "no step", 60)
    command = [sys.executable, str(ROOT / "launch" / "jobs.py"), "runs/x", "stop"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    until(lambda: not slurm(environment, "squeue", "-h", "-j", job_id, "-t", "PD,R,CG"), "it does not end", 60)
    assert read(run.attempt(2).job)["state"] == "stopped"
    assert "optim.ler: unknown setting; did you mean optim.lr?" in (tmp_path / f"slurm-{bad}.out").read_text()
    assert json.loads((run.checkpoints / "step").read_text()) == read(run.attempt(2).train)["step"]
