"""Pure: a plan -> the text that runs: by sbatch, by bash in an allocation, or as a torchrun for each simulated node.

text = script(plan, home, starts)       # `--dry-run` prints it
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import allocation as allocations
from launch import cluster as clusters
from launch import sweep, torchrun
from launch.planning import Plan, Start
from vitdist.rundir import RunDir


def script(plan: Plan, home: RunDir, starts: Sequence[Start]) -> str:
    """Exactly what will run: by sbatch, by bash in an allocation, or as a torchrun for each simulated node."""
    if not plan.cluster:
        return "#!/bin/bash\n" + "".join(_local_script(plan, start) for start in starts)
    if plan.allocation:
        return "\n".join(_allocation_script(plan, start) for start in starts)
    return _sbatch_script(plan, home, starts)


def _sbatch_script(plan: Plan, home: RunDir, starts: Sequence[Start]) -> str:
    parameters = _parameters(plan, home)
    more = parameters["additional_parameters"]
    if plan.after:
        # afterok: who waits for a run wants what it leaves; a requeue is no end. SLURM takes away what can never
        # start, instead of leaving it in the queue for ever.
        parameters["dependency"] = "afterok:" + ":".join(plan.after)
        more["kill-on-invalid-dep"] = "yes"
    if not plan.points:
        parameters["setup"] += _epilogue(home.submitit)
        return sbatch(parameters, _task(home.submitit), home.submitit / "%j")
    # Each point has its pickles and logs in its own folder, whose name ends with the number: %2a in SLURM's words.
    digits = len(plan.points[0][0].name) - len(home.name) - 1
    numbers = [start.number for start in starts]
    at_once = min(plan.at_once or len(starts), len(starts))
    more["array"] = f"{sweep.ranges(numbers)}%{at_once}"
    own = f'{shlex.quote(str(home.path))}-"$(printf %0{digits}d "$SLURM_ARRAY_TASK_ID")"/submitit'
    parameters["setup"] += _epilogue(own)
    return sbatch(parameters, _task(own), Path(f"{home.path}-%{digits}a", "submitit", "%A_%a"))


def sbatch(parameters: Mapping[str, Any], command: str, log: Path) -> str:
    """A script for sbatch: the text that submitit makes of the same keywords, without its import, which is half of a
    dry run's time. `command`: quoted; `log`: what the names of the node logs begin with, in SLURM's words.
    """
    own = ("setup", "srun_args", "additional_parameters", "signal_delay_s", "stderr_to_stdout")
    flags = {name.replace("_", "-"): value for name, value in parameters.items() if name not in own}
    flags |= {"signal": f"USR2@{parameters['signal_delay_s']}", "output": f"{log}_0_log.out", "open-mode": "append"}
    flags |= {"wckey": "submitit"} | parameters["additional_parameters"]
    lines = [
        f"#SBATCH --{name}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for name, value in sorted(flags.items())
    ]
    srun = shlex.join(["srun", "--unbuffered", "--output", f"{log}_%t_log.out", *parameters["srun_args"]])
    setup = ["# setup", *parameters["setup"], ""]
    run = ["# command", "export SUBMITIT_EXECUTOR=slurm", f"{srun} {command}", ""]
    return "\n".join(["#!/bin/bash", "", "# Parameters", *lines, "", *setup, *run])


def _parameters(plan: Plan, home: RunDir) -> dict[str, Any]:
    assert plan.cluster
    return clusters.submitit_parameters(plan.cluster, plan.nodes, home.name, home)


def _task(submitit: Path | str) -> str:
    """What srun starts on each node; a text is quoted already."""
    return _python("submitit.core._submit", submitit)


def _python(module: str, submitit: Path | str) -> str:
    where = submitit if isinstance(submitit, str) else shlex.quote(str(submitit))
    return f"{shlex.quote(sys.executable)} -u -m {module} {where}"


def _epilogue(submitit: Path | str) -> list[str]:
    """Lines that have launch/epilogue.py look at a step that failed; a site's own trap runs after it.

    SLURM's signals at a requeue must not end it before it has left bad nodes out.
    """
    look = f"[ $code = 0 ] || {_python('launch.epilogue', submitit)} $code"
    return [
        'eval "set -- $(trap -p EXIT)"; at_exit=${3-}',
        f"epilogue() {{ code=$?; set +e; trap '' TERM USR2; {look}; (exit $code); eval \"$at_exit\"; }}",
        "trap epilogue EXIT",
    ]


def _allocation_script(plan: Plan, start: Start) -> str:
    assert plan.allocation
    parameters = _parameters(plan, start.run)
    size = allocations.srun_args(plan.nodes, plan.allocation)
    parameters["srun_args"] = [*parameters["srun_args"], *size]
    command = allocations.task(_task(start.run.submitit))
    return allocations.script(sbatch(parameters, command, start.run.submitit / "%j"))


def _local_script(plan: Plan, start: Start) -> str:
    run = start.run
    lines = [f"# {plan.nodes} simulated nodes of {run.path}", *clusters.setup_lines(run, [])]
    for node in range(plan.nodes):
        devices = ",".join(plan.devices[node * plan.processes :][: plan.processes])
        port = torchrun.port(str(run.path), start.attempt)
        command = torchrun.argv(
            sys.executable, plan.nodes, node, plan.processes, torchrun.LOCAL, port, str(run.path), start.attempt
        )
        lines.append(f"CUDA_VISIBLE_DEVICES={devices} {shlex.join(command)} &")
    return "\n".join([*lines, "wait", ""])
