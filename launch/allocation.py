"""Inside `salloc`: a run on the nodes that are there already, by srun instead of sbatch.

    job_id = find(env)                          # "4711" in a shell of salloc; None elsewhere, in a batch script too
    here = read(scontrol's line, False)         # Allocation(nodes=2, gpus=8, ...)
    text = script(sbatch's script)              # what bash runs: the same lines

Pure. The node jobs are those of a batch job; only that SLURM does not start them again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

KEPT = ("SLURM_CONF", "SLURM_JOB_ID")
"""All that srun needs of an allocation's variables; SLURM_CPU_BIND and its like would reach the trainers."""
_INTERACTIVE_STEP = "4294967290"
"""SLURM_INTERACTIVE_STEP of slurm.h: salloc's own shell on a node, which takes no resources."""


@dataclass(frozen=True)
class Allocation:
    """What was allocated."""

    job_id: str
    nodes: int
    cpus: int
    """On each node."""
    gpus: int
    """On each node."""
    minutes: int | None
    """Limit of the allocation; None: there is none."""
    end: str
    """When it ends, as SLURM writes a local time; "": it does not say."""
    overlap: bool = False
    """Whether this shell is a step that holds the cores which the run's step needs."""


def find(env: Mapping[str, str]) -> str | None:
    """The job whose allocation this shell has; None outside of one, and in a batch script, which may submit others."""
    job_id = env.get("SLURM_JOB_ID", "")
    if not job_id.isascii() or not job_id.isdigit() or "SLURM_JOB_NUM_NODES" not in env:
        return None
    return None if env.get("ENVIRONMENT") == "BATCH" or "SLURM_ARRAY_TASK_ID" in env else job_id


def shares_step(env: Mapping[str, str]) -> bool:
    """Whether this shell is itself a step (`srun --pty`) that holds the cores which a new step needs."""
    return env.get("SLURM_STEP_ID", _INTERACTIVE_STEP) != _INTERACTIVE_STEP


def read(text: str, overlap: bool) -> Allocation | None:
    """From the line of `scontrol show job ID -o`; None if it is not running. `overlap`: see `shares_step`."""
    fields = dict(re.findall(r"(\S+?)=(\S*)", text))
    if fields.get("JobState") != "RUNNING":
        return None
    nodes = int(fields["NumNodes"].split("-")[0])
    return Allocation(
        job_id=fields["JobId"],
        nodes=nodes,
        cpus=max(1, int(fields["NumCPUs"].split("-")[0]) // nodes),
        gpus=_gpus(text, fields, nodes),
        minutes=_minutes(fields.get("TimeLimit", "")),
        end=fields["EndTime"] if fields.get("EndTime", "")[:1].isdigit() else "",
        overlap=overlap,
    )


def _gpus(text: str, fields: Mapping[str, str], nodes: int) -> int:
    """GPUs on each node: TresPerNode=gres:gpu:h100:8, or gres/gpu=16 of the whole job."""
    per_node = re.search(r"\bTresPerNode=\S*?gpu(?::[A-Za-z_][^:,\s]*)?[:=](\d+)", text)
    if per_node:
        return int(per_node[1])
    total = re.search(r"\b(?:Alloc)?TRES=\S*?gres/gpu=(\d+)", text)
    return int(total[1]) // nodes if total else 0


def _minutes(limit: str) -> int | None:
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return max(1, (days * 24 + hours) * 60 + minutes - (seconds > 59))


def srun_args(nodes: int, here: Allocation) -> list[str]:
    """More flags for srun: sbatch's lines do not reach it here."""
    flags = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--open-mode=append"]
    return [*flags, "--overlap"] if here.overlap else flags


def task(command: str) -> str:
    """What each node runs. SLURM tells a step of the whole job's nodes, of which it may have a part."""
    own = "export SLURM_JOB_NUM_NODES=$SLURM_STEP_NUM_NODES SLURM_JOB_NODELIST=$SLURM_STEP_NODELIST"
    return f"bash -c '{own}; exec \"$@\"' step {command}"


def script(sbatch: str) -> str:
    """A batch script without sbatch's lines; srun takes the place of bash, so that signals reach it."""
    kept = [line for line in sbatch.splitlines() if not line.startswith("#SBATCH ") and line != "# Parameters"]
    text = "\n".join(line for line in kept if line)
    return text.replace("\nsrun ", "\nexec srun ") + "\n"
