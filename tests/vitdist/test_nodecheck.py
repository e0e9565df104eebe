"""What a node must pass before training."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vitdist import config, nodecheck, rundir
from vitdist.nodecheck import Gpu, Node, judge
from vitdist.rundir import RunDir

H100 = Gpu("NVIDIA H100 80GB HBM3", 81559, 4, 0)


def node(**changes: object) -> Node:
    found: dict[str, object] = {"host": "n1", "time": 0.0, "gpus": [H100] * 8, "cores": 96, "files": 65536}
    return Node(**found | {"free_mb": {"/tmp": 10_000}} | changes)  # type: ignore[arg-type]


def test_a_good_node_passes() -> None:
    assert judge(node(), 8, 8, 8) == nodecheck.Verdict([], [])


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"gpus": [H100] * 7}, "7 of 8 GPUs"),
        ({"gpus": [], "gpu_fault": "no answer in 20 s"}, "nvidia-smi: no answer in 20 s"),
        ({"gpus": [*[H100] * 7, Gpu("NVIDIA A100", 81559, 4, 0)]}, "GPUs of different types: NVIDIA A100, NVIDIA H100"),
        ({"gpus": [Gpu("x", 81559, 70_000, 0), *[H100] * 7]}, "GPU 0: 70000 MB are in use by another process"),
        ({"gpus": [*[H100] * 7, Gpu("x", 1, 1, 0, True)]}, "GPU 7: a broken row of its memory could not be replaced"),
        ({"unwritable": {"/runs/a": "Read-only file system"}}, "/runs/a: Read-only file system"),
        ({"unreadable": {"/data/train": "cannot be read here (No such file or directory)"}}, "/data/train: cannot be"),
        ({"free_mb": {"/dev/shm": 12}}, "/dev/shm: 12 MB free"),
    ],
)
def test_L4_what_is_wrong_is_said(changes: dict[str, object], fault: str) -> None:
    assert any(text.startswith(fault) for text in judge(node(**changes), 8, 8, 8).faults)


def test_what_is_only_suspect_is_a_warning() -> None:
    few = node(cores=16, files=256, gpus=[Gpu("x", 80_000, 4, 3), *[Gpu("x", 80_000, 4, 0)] * 7])
    verdict = judge(few, 8, 8, 8)
    assert not verdict.faults
    assert [text.split(":")[0].split(" for")[0] for text in verdict.warnings] == [
        "GPU 0",
        "16 cores",
        "a process may open 256 files only",
    ]


def test_nvidia_smi_is_read() -> None:
    lines = ["NVIDIA H100 80GB HBM3, 81559, 4, 0", "NVIDIA GeForce RTX 4090, 24564, 300, [N/A]"]
    assert nodecheck.read_gpus(lines, [False, True]) == [
        H100,
        Gpu("NVIDIA GeForce RTX 4090", 24564, 300, None, remap_failed=True),
    ]


@pytest.mark.processes
def test_as_a_command_it_prints_what_it_found(recipe: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a run")
    val = tmp_path / "val"  # of its own: it is going to be damaged
    shutil.copytree(config.load(recipe).data.val, val)
    rundir.publish(run.config, config.to_yaml(config.with_absolute_paths(config.load(recipe, [f"data.val={val}"]))))
    command = [sys.executable, "-m", "vitdist.nodecheck", str(run.path), "--processes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    told = json.loads(done.stdout)
    assert told["faults"] == []
    assert told["versions"]["torch"]
    assert set(told["free_mb"]) >= {str(run.path), "/dev/shm"}
    shard = next(val.glob("*.tar"))
    shard.write_bytes(b"")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["faults"] == [f"{shard}: is empty here"]


def test_settings_that_cannot_be_read_are_left_to_the_trainers(tmp_path: Path) -> None:
    assert nodecheck.look(RunDir(tmp_path), None, 0).unreadable == {}
