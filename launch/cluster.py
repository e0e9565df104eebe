"""Where a run goes: a profile (slurm/*.yaml) -> what submitit is told; SLURM if there is one, else this machine.

    cluster, notes = resolve(parse(Cluster, read_yaml("slurm/default.yaml"), ...), slurm.partitions(10))
    submitit_parameters(cluster, nodes=4, name="vit", run=RunDir(...))

The second is pure; the first is too, given what SLURM answers.
"""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from launch.slurm import Slurm, ask, minutes
from vitdist.config import Section
from vitdist.rundir import RunDir

# What reaches an #SBATCH line: no blank, quote, newline or `$(`, whatever SLURM or a shell would do with them.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:+=@/-]{0,199}$")]
NodeList = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,\[\]-]{0,999}$")]
Features = Annotated[str, Field(pattern=r"^[A-Za-z0-9_(\[][A-Za-z0-9_.,:&|*()\[\]-]{0,199}$")]
SrunFlag = Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[A-Za-z0-9_.,:+@/%-]+)?$")]
ShellLine = Annotated[str, Field(pattern=r"^[^\n\r\x00]+$")]

# Where nobody can be asked: the usual node of a training cluster (DGX, HGX) and 8 loader processes for each GPU,
# the most that data.workers: auto takes.
ASSUMED_GPUS = 8
ASSUMED_CPUS_PER_GPU = 8


class Cluster(Section):
    """A profile: everything about the place, nothing about the training."""

    partition: Word | None = None
    """Partition, or several with commas between; default: the cluster's own default."""
    account: Word | None = None
    """Account that is charged, where the cluster has them."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Features | None = None
    """Features that a node must have, such as `a100&ib`."""
    exclude: NodeList | None = None
    """Nodes not to use, such as `node[3,17]`."""
    comment: Word | None = None
    """Shown by squeue; some sites want a project there."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | Literal["auto"] = "auto"
    """GPUs and ranks on each node; 0: one rank on the CPU. auto: all that sinfo shows for the partition."""
    gpu_type: Word | None = None
    """Type of GPU in SLURM's words, such as `a100`, where the partition has several."""
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """How to ask for GPUs: `--gpus-per-node=8`, or `--gres=gpu:8` where the site takes only that."""
    cpus_per_task: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Cores on each node. auto: the node's, in proportion to its GPUs."""
    mem_gb: Annotated[int, Field(ge=1)] | Literal["all", "default"] = "all"
    """Memory on each node. all: `--mem=0`, the whole node's; default: whatever the site gives when nothing is said."""
    exclusive: bool = False
    """No other job on the nodes."""
    time: Annotated[int, Field(ge=1)] | str = "12:00:00"
    """Limit of one start: minutes, or HH:MM:SS, or D-HH:MM:SS. A run that is not done by then saves and requeues."""
    signal_delay_s: Annotated[int, Field(ge=30, le=3600)] = 120
    """Seconds before the limit at which the run is told to save. Must cover a checkpoint."""
    setup: Annotated[tuple[ShellLine, ...], Field(strict=False)] = ()
    """Shell lines run on the first node before the trainers start, after `slurm/env.sh`; `module load` and the like."""
    srun_args: Annotated[tuple[SrunFlag, ...], Field(strict=False)] = ()
    """More flags for srun."""

    @property
    def minutes(self) -> int:
        return minutes(self.time)

    @model_validator(mode="after")
    def _time_to_save(self) -> "Cluster":
        # SLURM may signal up to 60 s early, and a job whose Python has not started by then dies of the signal.
        if self.minutes * 60 <= self.signal_delay_s + 120:
            raise ValueError(
                f"time {self.time} is too short to start and to save in: it must be over signal_delay_s "
                f"({self.signal_delay_s} s) + 120 s"
            )
        return self


# ---- what there is -------------------------------------------------------------------------------


def local_gpus(visible: str | None) -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them; `visible`: its value now."""
    if visible is not None:
        return [device for device in visible.split(",") if device and device != "-1"]
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if not count and shutil.which("nvidia-smi"):  # WSL has no /dev/nvidia0
        count = (ask(["nvidia-smi", "-L"], 10) or "").count("GPU ")
    return [str(i) for i in range(count)]


# ---- what submitit is told -----------------------------------------------------------------------


def resolve(cluster: Cluster, slurm: Slurm | None) -> tuple[Cluster, list[str]]:
    """The profile with a number for each `auto`, and what had to be assumed for that."""
    nodes = slurm.nodes(cluster.partition) if slurm else []
    notes: list[str] = []
    gpus, cpus = cluster.gpus_per_node, cluster.cpus_per_task
    if gpus == "auto":
        kinds = sorted({kind.gpus for kind in nodes if kind.gpus})
        gpus = kinds[0] if kinds else 0 if nodes else ASSUMED_GPUS
        if not nodes:
            notes.append(f"gpus_per_node: not known here, {gpus} assumed; write the number into the profile")
        elif len(kinds) > 1:
            shown = ", ".join(map(str, kinds))
            notes.append(f"gpus_per_node: there are nodes with {shown}, {gpus} taken; the profile may say more")
    if cpus == "auto":
        able = [kind for kind in nodes if kind.gpus >= gpus]
        if able:
            cpus = max(1, min(kind.cpus * gpus // kind.gpus if gpus else kind.cpus for kind in able))
        else:
            cpus = max(1, ASSUMED_CPUS_PER_GPU * gpus)
            notes.append(f"cpus_per_task: not known here, {cpus} assumed; write the number into the profile")
    return cluster.model_copy(update={"gpus_per_node": gpus, "cpus_per_task": cpus}), notes


def submitit_parameters(cluster: Cluster, nodes: int, name: str, run: RunDir) -> dict[str, Any]:
    """Keywords of submitit's SlurmExecutor for a resolved profile."""
    assert cluster.gpus_per_node != "auto"
    assert cluster.cpus_per_task != "auto"
    named = ("partition", "account", "qos", "constraint", "exclude", "comment")
    wanted = {field: getattr(cluster, field) for field in named}
    gpus: dict[str, Any] = {}
    if cluster.gpus_per_node:
        kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
        if cluster.gpu_request == "gres":
            gpus = {"gres": f"gpu:{kind}{cluster.gpus_per_node}"}
        else:
            gpus = {"gpus_per_node": f"{kind}{cluster.gpus_per_node}"}
    # --requeue: also where the site's default (JobRequeue) says no.
    more: dict[str, Any] = {"requeue": True}
    if cluster.mem_gb != "default":
        # Not submitit's own parameter, which makes 0GB of 0.
        more["mem"] = "0" if cluster.mem_gb == "all" else f"{cluster.mem_gb}G"
    return {
        "job_name": name,
        "nodes": nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cluster.cpus_per_task,
        **{key: value for key, value in wanted.items() if value is not None},
        **gpus,
        **({"exclusive": True} if cluster.exclusive else {}),
        "time": cluster.minutes,
        "signal_delay_s": cluster.signal_delay_s,
        "stderr_to_stdout": True,
        "additional_parameters": more,
        "setup": setup_lines(run, cluster.setup),
        # Without the first two, one dead node leaves the others waiting in a collective for ever. SLURM 22.05 to
        # 23.02 do not hand --cpus-per-task on to srun.
        "srun_args": [
            "--kill-on-bad-exit=1",
            "--wait=60",
            f"--cpus-per-task={cluster.cpus_per_task}",
            *cluster.srun_args,
        ],
    }


def setup_lines(run: RunDir, own: Sequence[str]) -> list[str]:
    """Shell lines that put a job into the run's code; `own` lines cannot move it elsewhere."""
    code = shlex.quote(str(run.code))
    return [
        f"cd {code} || exit 1",
        "if [ -f slurm/env.sh ]; then source slurm/env.sh; fi",
        *own,
        f"cd {code} || exit 1",
        f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]
