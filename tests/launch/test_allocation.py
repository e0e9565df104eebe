"""Inside of salloc: what was allocated, and the script that runs there."""

import pytest

from launch import allocation
from launch.allocation import Allocation

SALLOC = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2"}
# scontrol show job 4 -o, SLURM 22.05.8; its newer forms of GPUs below
LINE = (
    "JobId=4 JobName=interactive UserId=me(1) JobState=RUNNING Reason=None TimeLimit=1-02:03:04 "
    "EndTime=2026-11-25T19:14:41 NodeList=node[1-2] NumNodes=2 NumCPUs=192 NumTasks=2 TRES=cpu=192,node=2,billing=2 "
)


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({}, "4711"),
        ({"SLURM_STEP_ID": "0"}, "4711"),
        ({"ENVIRONMENT": "BATCH"}, None),
        ({"SLURM_ARRAY_TASK_ID": "0"}, None),
        ({"SLURM_JOB_ID": "stale; id"}, None),
        ({"SLURM_JOB_ID": ""}, None),
    ],
)
def test_an_allocation_is_found_by_its_variables(more: dict[str, str], found: str | None) -> None:
    assert allocation.find(SALLOC | more) == found
    assert allocation.find({"SLURM_JOB_ID": "4711"}) is None


def test_a_shell_that_is_a_step_shares_its_cores() -> None:
    assert not allocation.shares_step(SALLOC)
    assert not allocation.shares_step(SALLOC | {"SLURM_STEP_ID": "4294967290"})
    assert allocation.shares_step(SALLOC | {"SLURM_STEP_ID": "0"})


@pytest.mark.parametrize(
    ("gpus", "each"),
    [
        ("", 0),
        ("TresPerNode=gres:gpu:8", 8),
        ("TresPerNode=gres/gpu:h100:4", 4),
        ("TresPerNode=gres:gpu:a100:8(S:0-1)", 8),
        ("AllocTRES=cpu=192,mem=2T,node=2,billing=192,gres/gpu=16,gres/gpu:h100=16", 8),
    ],
)
def test_what_was_allocated(gpus: str, each: int) -> None:
    found = allocation.read(LINE + gpus, True)
    assert found == Allocation("4", 2, 96, each, 26 * 60 + 3, "2026-11-25T19:14:41", True)


def test_what_has_ended_or_has_no_limit() -> None:
    assert allocation.read(LINE.replace("RUNNING", "COMPLETED"), False) is None
    assert allocation.read("", False) is None
    free = LINE.replace("1-02:03:04", "UNLIMITED").replace("2026-11-25T19:14:41", "Unknown")
    found = allocation.read(free, False)
    assert found
    assert (found.minutes, found.end) == (None, "")


def test_the_script_is_the_batch_script_without_sbatch() -> None:
    sbatch = "#!/bin/bash\n\n# Parameters\n#SBATCH --nodes=2\n\n# setup\ncd /x\n\n# command\nsrun --wait=60 python x\n"
    assert allocation.script(sbatch) == "#!/bin/bash\n# setup\ncd /x\n# command\nexec srun --wait=60 python x\n"
    here = Allocation("4", 3, 1, 0, None, "", True)
    assert allocation.srun_args(2, here)[:2] == ["--nodes=2", "--ntasks=2"]
    assert "--overlap" in allocation.srun_args(2, here)
