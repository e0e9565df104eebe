"""Whole runs on the real SLURM of slurm/dev-cluster: several nodes to the end; warned, saved, requeued, gone on."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.slurm.conftest import submit, told, until
from vitdist import rundir
from vitdist.rundir import RunDir

pytestmark = pytest.mark.slurm


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.model / "model.safetensors")


def test_four_nodes_train_to_the_end(environment: dict[str, str], tmp_path: Path, recipe: Path) -> None:
    run = RunDir(tmp_path / "runs" / "four")
    job = submit(environment, tmp_path, "--nodes", "4", "--config", str(recipe), "--name", "four", "--follow")
    out, error = job.communicate(timeout=400)
    assert job.returncode == 0, f"{out}{error}{told(run)}"
    assert "top-1" in out
    record = rundir.state(run)
    assert record["state"] == "done"
    assert record["world"] == 4
    written = {str(path.relative_to(run.attempt(0).path)) for path in run.attempt(0).path.glob("logs/*/rank-*.log")}
    assert written == {f"logs/node-{i}/rank-{i}.log" for i in range(4)}
    launched = json.loads(run.attempt(0).job.read_text())
    assert launched["scheduler"] == "slurm"
    assert launched["hosts"] == ["node1", "node2", "node3", "node4"]
    assert launched["state"] == "done"
    assert run.submit.read_text().startswith("#!/bin/bash")
    assert (run.code / "vitdist" / "train.py").exists()
    assert run.report.exists()


def test_S1_S2_a_warned_run_is_requeued_and_ends_the_same(
    environment: dict[str, str], tmp_path: Path, recipe: Path
) -> None:
    """USR2, as SLURM sends it before the limit and at a preemption: save, requeue, go on, the same weights."""
    length = ["train.steps=300", "checkpoint.every_steps=100", "evaluation.every_epochs=100"]
    common = ["--nodes", "2", "--config", str(recipe), *length]
    warned, straight = RunDir(tmp_path / "runs" / "warned"), RunDir(tmp_path / "runs" / "straight")
    job = submit(environment, tmp_path, *common, "--name", "warned", "--follow")
    until(lambda: len(rundir.rows(warned)) > 5 or job.poll() is not None, "no step was done")
    launched = json.loads(warned.attempt(0).job.read_text())
    subprocess.run(["scancel", "--signal", "USR2", launched["job_id"]], env=environment, check=True, timeout=30)
    out, error = job.communicate(timeout=400)
    assert job.returncode == 0, f"{out}{error}{told(warned)}"
    first, second = (json.loads(warned.attempt(k).train.read_text()) for k in (0, 1))
    assert (first["state"], first["reason"]) == ("stopped", "SIGUSR2")
    assert 0 < first["step"] < 300
    assert second["state"] == "done"
    assert second["resumed_from"] == first["step"]
    assert json.loads(warned.attempt(0).job.read_text())["state"] == "requeued"
    assert json.loads(warned.attempt(1).job.read_text())["job_id"] == launched["job_id"]
    job = submit(environment, tmp_path, *common, "--name", "straight", "--follow")
    out, error = job.communicate(timeout=400)
    assert job.returncode == 0, f"{out}{error}{told(straight)}"
    expected, found = weights(straight), weights(warned)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_L2_an_unknown_partition_is_refused_before_anything_is_made(
    environment: dict[str, str], tmp_path: Path, recipe: Path
) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("partition: devv\n")
    job = submit(environment, tmp_path, "--nodes", "2", "--config", str(recipe), "--cluster", str(profile))
    _, error = job.communicate(timeout=60)
    assert job.returncode == rundir.EXIT_REFUSED
    assert "partition devv: this cluster has none of that name; did you mean dev?" in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_L2_L6_more_nodes_than_there_are_are_refused(environment: dict[str, str], tmp_path: Path, recipe: Path) -> None:
    job = submit(environment, tmp_path, "--nodes", "6", "--config", str(recipe), "train.global_batch=12", "--name", "x")
    _, error = job.communicate(timeout=60)
    assert job.returncode == rundir.EXIT_REFUSED
    assert "partition dev has 4 nodes" in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs" / "x").exists()
