"""Where a run goes: a profile (slurm/*.yaml) -> what submitit is told; SLURM if there is one, else this machine.

    cluster, notes = resolve(load("slurm/default.yaml"), slurm.partitions(10))
    submitit_parameters(cluster, nodes=4, name="vit", run=RunDir(...))      # the sbatch script, in submitit's words
    wrap(torchrun_command, cluster, places(run, settings, cluster), host)   # what a node really starts

All but `load` are pure, given what SLURM answers. Every field with what it is for: docs/your-cluster.md.
"""

import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, model_validator

from launch.slurm import Slurm, ask, minutes
from vitdist import config
from vitdist.config import Config, Section
from vitdist.rundir import RunDir

# What reaches an #SBATCH line: no blank, quote, newline or `$(`, whatever SLURM or a shell would do with them.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:+=@/-]{0,199}$")]
NodeList = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,\[\]-]{0,999}$")]
Features = Annotated[str, Field(pattern=r"^[A-Za-z0-9_(\[][A-Za-z0-9_.,:&|*()\[\]-]{0,199}$")]
Flag = Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[A-Za-z0-9_.,:+@/%-]+)?$")]
ShellLine = Annotated[str, Field(pattern=r"^[^\n\r\x00]+$")]
# A path that a shell may finish: $TMPDIR, ${USER} and the like, and a leading ~/; nothing else that it would run.
_VARIABLE = r"\$(?:[A-Z][A-Z0-9_]*|\{[A-Z][A-Z0-9_]*\})"


def _like(pattern: str, words: str) -> AfterValidator:
    """What a text must be, told in words where it is not."""
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(f"{value[:100]!r} is not usable: {words}")
        return value

    return AfterValidator(check)


# These become arguments of a command, without a shell between, or are quoted for one.
Argument = Annotated[str, _like(r"[^\x00-\x1f\x7f]{1,999}", "one line of 1 to 999 signs")]
Image = Annotated[
    str, _like(r"[\w./~@][^\x00-\x20\x7f,]{0,999}", "the path or name of an image, without blanks and commas")
]
Python = Annotated[str, _like(r"[\w./][\w.+/-]{0,199}", "the name or path of a Python")]
Bind = Annotated[
    str,
    _like(
        r"/[^\x00-\x1f\x7f,:]*(:/[^\x00-\x1f\x7f,:]*(:(ro|rw))?)?",
        "FROM, FROM:TO or FROM:TO:ro, absolute paths without commas",
    ),
]
Name = Annotated[str, _like(r"[A-Za-z_][A-Za-z0-9_]{0,99}", "the name of a variable: letters, digits and _")]
# NCCL takes lists, and a leading ^ (not these) or = (exactly these).
Interfaces = Annotated[
    str,
    _like(r"[\^=]{0,2}[A-Za-z0-9][A-Za-z0-9_.,:-]{0,199}", "names with commas between, such as ib0 or mlx5_0,mlx5_1"),
]
NodePath = Annotated[
    str,
    _like(
        rf"(?:/|~/|{_VARIABLE}(?:/|$))(?:[^\x00-\x1f\x7f\"\\`$!]|{_VARIABLE}){{0,400}}",
        "an absolute path, in which $NAME may stand for a variable of the node, without quotes and backslashes",
    ),
]

# Where nobody can be asked: the usual node of a training cluster (DGX, HGX) and 8 loader processes for each GPU,
# the most that data.workers: auto takes.
ASSUMED_GPUS = 8
ASSUMED_CPUS_PER_GPU = 8

# What a name of an environment variable that holds a secret looks like: profiles stand in run folders and scripts.
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS(WORD|WD)?($|_)|CREDENTIAL", re.IGNORECASE)
# Set by the launcher, SLURM or torchrun: a profile that sets them breaks a run in ways that are hard to find.
_OURS = re.compile(
    r"(SLURM|SLURMD|SBATCH|SRUN|SUBMITIT|TORCHELASTIC|PMI|PMIX)_.*|PYTHONPATH|RANK|LOCAL_RANK|GROUP_RANK|WORLD_SIZE|"
    r"LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|CUDA_VISIBLE_DEVICES"
)
# Flags that other fields write, or that the way a run stops and goes on hangs on.
_SBATCH_TAKEN = {
    *("job-name", "nodes", "ntasks-per-node", "ntasks", "cpus-per-task", "gpus-per-node", "gres", "partition"),
    *("account", "qos", "constraint", "exclude", "comment", "reservation", "time", "mem", "exclusive", "signal"),
    *("output", "error", "open-mode", "requeue", "no-requeue", "export", "array", "dependency", "wrap", "chdir"),
}


class Container(Section):
    """An image in which the trainers run. submitit and SLURM's commands stay outside of it."""

    image: Image
    """A file (.sif, .sqsh) or folder, a relative path is one beside the profile; or a name that the runtime looks up:
    docker://..., nvcr.io#nvidia/pytorch:25.09-py3."""
    runtime: Literal["apptainer", "singularity", "pyxis"] = "apptainer"
    """pyxis: a step of srun with --container-image, on each node."""
    python: Python = "python3"
    """The Python inside that has torch and the other requirements."""
    binds: Annotated[tuple[Bind, ...], Field(strict=False)] = ()
    """More of the host to see inside, FROM[:TO[:ro]]. The run folder, the shards, checkpoints and caches that the
    settings name are seen without it."""
    args: Annotated[tuple[Argument, ...], Field(strict=False)] = ()
    """More flags for `apptainer exec`, or for the srun of pyxis."""


class Cluster(Section):
    """A profile: everything about the place, nothing about the training."""

    # ---- which nodes

    partition: Word | None = None
    """Partition, or several with commas between; default: the cluster's own default."""
    account: Word | None = None
    """Account that is charged, where the cluster has them."""
    qos: Word | None = None
    """Quality of service."""
    reservation: Word | None = None
    """Reservation of nodes that the job may use."""
    constraint: Features | None = None
    """Features that a node must have, such as `a100&ib`."""
    exclude: NodeList | None = None
    """Nodes not to use, such as `node[3,17]`."""
    comment: Word | None = None
    """Shown by squeue; some sites want a project there."""

    # ---- what of a node

    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | Literal["auto"] = "auto"
    """GPUs and ranks on each node; 0: one rank on the CPU. auto: all that sinfo shows for the partition."""
    gpu_type: Word | None = None
    """Type of GPU in SLURM's words, such as `a100`, where the partition has several."""
    gpu_memory_gb: Annotated[float, Field(gt=0, le=10_000)] | None = None
    """Memory of one GPU in 10^9 bytes, which the plan of a run is held against; default: by the type's name."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How to ask for GPUs: `--gpus-per-node=8`, or `--gres=gpu:8` where the site takes only that, or not at all where
    SLURM does not count GPUs (whole nodes; gpus_per_node must be a number then)."""
    cpus_per_task: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Cores on each node. auto: the node's, in proportion to its GPUs."""
    mem_gb: Annotated[int, Field(ge=1)] | Literal["all", "default"] = "all"
    """Memory on each node. all: `--mem=0`, the whole node's; default: whatever the site gives when nothing is said."""
    exclusive: bool = False
    """No other job on the nodes."""

    # ---- how long

    time: Annotated[int, Field(ge=1)] | str = "12:00:00"
    """Limit of one start: minutes, or HH:MM:SS, or D-HH:MM:SS. A run that is not done by then saves and requeues."""
    signal_delay_s: Annotated[int, Field(ge=30, le=3600)] = 120
    """Seconds before the limit at which the run is told to save. Must cover a checkpoint."""
    max_starts: Annotated[int, Field(ge=1)] | None = None
    """Starts of one job at most, whatever ends them; default: no limit. Time limits, preemptions and lost nodes are
    not counted otherwise, crashes are (three in a row without a new checkpoint end a run)."""

    # ---- the environment of the trainers

    environment: NodePath | None = None
    """Shell script that is sourced on the first node after `slurm/env.sh`; what it exports reaches all nodes. A
    relative path is one beside the profile. The job ends where it cannot be read."""
    setup: Annotated[tuple[ShellLine, ...], Field(strict=False)] = ()
    """Shell lines run on the first node before the trainers start, after `environment`; `module load` and the like."""
    env: dict[Name, Argument | int] = Field(default={})
    """Variables for all nodes, such as {NCCL_DEBUG: INFO}. Their values are not looked at by a shell. No secrets: the
    profile stands in the run folder."""
    container: Container | None = None
    """Image in which the trainers run."""

    # ---- cores and network

    numa_binding: Literal["node", "socket", "exclusive", "core-complex"] | None = None
    """torchrun's --numa-binding: each rank to the cores near its GPU. It asks the NVIDIA driver, so only with GPUs."""
    cpu_bind: Literal["none", "cores", "threads", "sockets", "ldoms"] | None = None
    """srun's --cpu-bind for the one task of a node; none: all cores of the job. Default: the site's."""
    prefix: Annotated[tuple[Argument, ...], Field(strict=False)] = ()
    """A command before torchrun on each node, such as [numactl, --localalloc]."""
    network_interface: Interfaces | None = None
    """Interface over which ranks find each other, such as `ib0` (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)."""
    infiniband: Interfaces | None = None
    """Adapters for NCCL, such as `mlx5_0,mlx5_1` (NCCL_IB_HCA); off: none of them (NCCL_IB_DISABLE=1)."""

    # ---- folders

    node_disk: NodePath | None = None
    """Folder on a disk of each node, such as `/local/scratch` or `$TMPDIR`, which keeps what was read of the shards:
    fills data.cache where the settings leave it open."""
    node_disk_gb: Annotated[float, Field(gt=0)] | None = None
    """Most that is kept there, in 10^9 bytes; default: that of data.cache_gb."""
    hf_home: NodePath | None = None
    """Folder that login node and compute nodes share for weights of Hugging Face (HF_HOME); default: that of your
    shell, else ~/.cache/huggingface."""
    compile_cache: NodePath | None = None
    """Folder for what torch compiles (TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR, TORCH_EXTENSIONS_DIR); one on a node's
    disk is safe, a shared one saves the first start of each node."""

    # ---- what a site wants otherwise

    export: Literal["all", "none"] = "all"
    """none: the job does not get the variables of your shell (`--export=NONE`), which some sites want."""
    sbatch_args: Annotated[tuple[Flag, ...], Field(strict=False)] = ()
    """More flags for sbatch, such as --licenses=scratch."""
    srun_args: Annotated[tuple[Flag, ...], Field(strict=False)] = ()
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

    @model_validator(mode="after")
    def _known_names(self) -> "Cluster":
        for name in self.env:
            if _SECRET.search(name):
                raise ValueError(
                    f"env: {name} looks like a secret, and a profile stands in run folders: export it in the shell "
                    "that submits, or keep it in ~/.netrc"
                )
            if _OURS.fullmatch(name):
                raise ValueError(f"env: {name} is set by the launcher, SLURM or torchrun; a profile cannot set it")
        for flag in self.sbatch_args:
            if (name := _flag_name(flag)) in _SBATCH_TAKEN:
                field = name.replace("-", "_")
                hint = f"use the field {field}" if field in type(self).model_fields else "the launcher sets it"
                raise ValueError(f"sbatch_args: --{name}: {hint}")
        return self

    @model_validator(mode="after")
    def _of_gpus(self) -> "Cluster":
        if self.gpu_request == "none" and self.gpus_per_node == "auto":
            raise ValueError("gpus_per_node must be a number with gpu_request: none, as SLURM does not count them")
        if self.numa_binding and self.gpus_per_node == 0:
            raise ValueError("numa_binding asks the NVIDIA driver which cores are near: it needs gpus_per_node above 0")
        if self.container and self.container.runtime == "pyxis" and self.export == "none":
            raise ValueError("export: none hides the container's variables from its srun: with pyxis use export: all")
        return self


def _flag_name(flag: str) -> str:
    return flag.removeprefix("--").partition("=")[0]


def load(path: str | Path, time: str | None = None) -> Cluster:
    """The profile in a YAML file, paths beside it made absolute; `time` instead of its own. Raises SettingsError."""
    raw = config.read_yaml(path)
    folder = Path(path).absolute().parent
    if isinstance(script := raw.get("environment"), str):
        raw["environment"] = _beside(script, folder)
    container = raw.get("container")
    if isinstance(container, dict) and isinstance(image := container.get("image"), str):
        # An image that is no file is a name for the runtime to look up.
        there = image.startswith((".", "~")) or (folder / image).exists()
        raw["container"] = {**container, "image": _beside(image, folder) if there else image}
    return config.parse(Cluster, raw | ({"time": time} if time else {}), path)


def _beside(path: str, folder: Path) -> str:
    if path.startswith(("/", "$")):
        return path
    return os.path.expanduser(path) if path.startswith("~") else os.path.normpath(folder / path)


# ---- what there is -------------------------------------------------------------------------------


def local_gpus(visible: str | None) -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them; `visible`: its value now."""
    if visible is not None:
        return [device for device in visible.split(",") if device and device != "-1"]
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if not count and shutil.which("nvidia-smi"):  # WSL has no /dev/nvidia0
        count = (ask(["nvidia-smi", "-L"], 10) or "").count("GPU ")
    return [str(i) for i in range(count)]


# Of GPUs by a part of their type's name as sites and NVIDIA's driver write it: (least, most) in 10^9 bytes, as two
# memories were sold under many a name. Sources: NVIDIA's data sheets. The first that matches counts.
_GPU_MEMORY_GB: tuple[tuple[str, float, float], ...] = (
    (r"(?<![0-9])(\d{2,3})_?gb", 0, 0),  # a100-sxm4-80gb says it itself
    (r"gb200|b200", 180, 192),
    (r"gh200", 96, 144),
    (r"h200", 141, 141),
    (r"h100", 80, 94),
    (r"a100", 40, 80),
    (r"v100", 16, 32),
    (r"l40", 48, 48),
    (r"a40(?![0-9])|a6000", 48, 48),
    (r"a30(?![0-9])", 24, 24),
    (r"a10(?![0-9])|l4(?![0-9])", 24, 24),
    (r"t4(?![0-9])", 16, 16),
    (r"p100", 12, 16),
    (r"4090|3090", 24, 24),
)


def gpu_memory_gb(cluster: Cluster, types: Sequence[str] = ()) -> tuple[float, float] | None:
    """(least, most) memory of one GPU in 10^9 bytes; None where nobody knows.

    `types`: those of the partition in SLURM's words, where the profile names none.
    """
    if cluster.gpu_memory_gb:
        return cluster.gpu_memory_gb, cluster.gpu_memory_gb
    names = [cluster.gpu_type] if cluster.gpu_type else list(types)
    found = [known for name in names if (known := _memory_of(name))]
    return (min(least for least, _ in found), max(most for _, most in found)) if found else None


def _memory_of(gpu_type: str) -> tuple[float, float] | None:
    for pattern, least, most in _GPU_MEMORY_GB:
        if match := re.search(pattern, gpu_type.lower()):
            return (float(match[1]), float(match[1])) if not most else (least, most)
    return None


# ---- what submitit is told -----------------------------------------------------------------------


def resolve(cluster: Cluster, slurm: Slurm | None) -> tuple[Cluster, list[str]]:
    """The profile with a number for each `auto`, and what had to be assumed for that."""
    nodes = slurm.nodes(cluster.partition) if slurm else []
    if cluster.gpu_type and any(cluster.gpu_type in kind.gpu_types for kind in nodes):
        nodes = [kind for kind in nodes if cluster.gpu_type in kind.gpu_types]
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
        counted = cluster.gpu_request != "none"
        able = [kind for kind in nodes if kind.gpus >= gpus or not counted]
        if able:
            cpus = max(1, min(kind.cpus * gpus // kind.gpus if gpus and counted else kind.cpus for kind in able))
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
    if cluster.gpus_per_node and cluster.gpu_request != "none":
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
    if cluster.reservation:
        more["reservation"] = cluster.reservation
    if cluster.export == "none":
        more["export"] = "NONE"
    for flag in cluster.sbatch_args:
        more[_flag_name(flag)] = flag.partition("=")[2] or True
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
        "setup": setup_lines(run, site_lines(cluster)),
        # Without the first two, one dead node leaves the others waiting in a collective for ever. SLURM 22.05 to
        # 23.02 do not hand --cpus-per-task on to srun.
        "srun_args": [
            "--kill-on-bad-exit=1",
            "--wait=60",
            f"--cpus-per-task={cluster.cpus_per_task}",
            *([f"--cpu-bind={cluster.cpu_bind}"] if cluster.cpu_bind else []),
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


def site_lines(cluster: Cluster) -> list[str]:
    """Shell lines of a profile, for the batch script: its script, then its variables, then its own lines."""
    lines = []
    if cluster.environment:
        script = quoted(cluster.environment)
        silent = f'{{ echo "the profile\'s environment "{script}" cannot be read on $(hostname)" >&2; exit 1; }}'
        lines.append(f"[ -r {script} ] || {silent}; source {script}")
    if cluster.export == "none":
        # sbatch's NONE goes on to srun as SLURM_EXPORT_ENV, and the nodes would get nothing of the lines below.
        lines.append("export SLURM_EXPORT_ENV=ALL")
    lines += [f"export {name}={value}" for name, value in exports(cluster).items()]
    return [*lines, *cluster.setup]


def exports(cluster: Cluster) -> dict[str, str]:
    """Variables of a profile, with values quoted for a shell; what `env` says counts before the other fields."""
    found: dict[str, str] = {}
    if cluster.network_interface:
        found["NCCL_SOCKET_IFNAME"] = shlex.quote(cluster.network_interface)
        if not cluster.network_interface.startswith(("^", "=")):  # NCCL's own notation
            found["GLOO_SOCKET_IFNAME"] = shlex.quote(cluster.network_interface)
    if cluster.infiniband == "off":
        found["NCCL_IB_DISABLE"] = "1"
    elif cluster.infiniband:
        found["NCCL_IB_HCA"] = shlex.quote(cluster.infiniband)
    if cluster.hf_home:
        found["HF_HOME"] = quoted(cluster.hf_home)
    if cluster.compile_cache:
        for name, part in (
            ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
            ("TRITON_CACHE_DIR", "triton"),
            ("TORCH_EXTENSIONS_DIR", "torch_extensions"),
        ):
            found[name] = quoted(f"{cluster.compile_cache.rstrip('/')}/{part}")
    return found | {name: shlex.quote(str(value)) for name, value in cluster.env.items()}


def quoted(path: str) -> str:
    """A NodePath for a shell, which fills in its variables, ends where it lacks one, and runs nothing."""
    if path.startswith("~/"):
        path = f"$HOME/{path[2:]}"
    if "$" not in path:
        return shlex.quote(path)
    return '"' + re.sub(_VARIABLE, lambda match: f"${{{match[0].strip('${}')}:?is not set here}}", path) + '"'


def filled_in(path: str, variables: Mapping[str, str]) -> str | None:
    """A NodePath as a shell with these variables would read it; None if it lacks one."""
    if path.startswith("~/"):
        path = f"$HOME/{path[2:]}"
    names = [(match[0], match[0].strip("${}")) for match in re.finditer(_VARIABLE, path)]
    if any(not variables.get(name) for _, name in names):
        return None
    return re.sub(_VARIABLE, lambda match: variables[match[0].strip("${}")], path)


def staged(settings: Config, cluster: Cluster) -> Config:
    """The settings with the node's disk of the profile as the cache of shards, if they name none."""
    if cluster.node_disk is None or settings.data.cache is not None:
        return settings
    update: dict[str, Any] = {"cache": f"{cluster.node_disk.rstrip('/')}/vitdist-cache"}
    if cluster.node_disk_gb:
        update["cache_gb"] = cluster.node_disk_gb
    return settings.model_copy(update={"data": settings.data.model_copy(update=update)})


def offline(settings: Config, cluster: Cluster) -> Cluster:
    """The profile of a job that finds its weights in the shared cache, so that its nodes ask nobody."""
    if not from_hub(settings) or "HF_HUB_OFFLINE" in cluster.env:
        return cluster
    return cluster.model_copy(update={"env": {"HF_HUB_OFFLINE": 1, **cluster.env}})


def from_hub(settings: Config) -> str | None:
    """The Hugging Face id that the run begins with; None for random weights, a file or a folder."""
    start = settings.model.pretrained
    return None if start is None or settings.model.weights_file or start.startswith("/") else start


# ---- what a node starts --------------------------------------------------------------------------

# What starts inside of a container must ignore USR2 as torchrun outside does: SLURM sends it to every process, and an
# inherited "ignored" is lost on the way, at the exec of apptainer (a Go program) and in the other step of pyxis.
_DEAF = ("sh", "-c", 'trap "" USR2; exec "$@"', "sh")


def of_run(run: RunDir) -> Cluster | None:
    """The profile that a run was submitted with; None if it runs on this machine. Raises SettingsError, OSError."""
    record = yaml.safe_load(run.cluster.read_text(encoding="utf-8")) or {}
    return config.parse(Cluster, record["profile"], run.cluster) if record.get("profile") else None


def places(run: RunDir, settings: Config, cluster: Cluster) -> list[str]:
    """Folders and files outside of an image that a run reads or writes, nested ones left out; for `wrap`.

    Only literal ones: what a shell of the node must fill in (`$TMPDIR`) the container must show by itself.
    """
    data, model = settings.data, settings.model
    wanted = [str(run.path), *data.train_sets, data.val, data.cache, model.pretrained, model.warm_start]
    wanted += [cluster.hf_home, cluster.compile_cache]
    found = sorted({os.path.normpath(place) for place in wanted if place and place.startswith("/")})
    return [place for place in found if not any(place.startswith(f"{other.rstrip('/')}/") for other in found)]


def wrap(command: Sequence[str], cluster: Cluster, places: Sequence[str] = (), host: str = "") -> list[str]:
    """torchrun's command (`python -m MODULE ...`) as a node starts it: bound to cores, inside the container.

    `places`: what of the host it must see; `host`: SLURM's name of this node, for pyxis. The process that starts need
    not be torchrun: in a container the trainers are deeper below it, with pyxis below slurmstepd.
    """
    python, dash_m, module, *rest = command
    assert dash_m == "-m"
    binding = ["--numa-binding", cluster.numa_binding] if cluster.numa_binding else []
    box = cluster.container
    if box is None:
        return [*cluster.prefix, python, "-m", module, *binding, *rest]
    inner = [*_DEAF, box.python, "-m", module, *binding, *rest]
    if box.runtime == "pyxis":
        mounts = [*(f"{place}:{place}" for place in places), *(_mount(bind) for bind in box.binds)]
        known = ["PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", *exports(cluster)]
        return [
            # A step beside the one that this process is of, on this node alone, with all that the job has of it.
            *("srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "--mem=0"),
            *(f"--cpus-per-task={cluster.cpus_per_task}", "--cpu-bind=none", "--input=none", "--unbuffered"),
            f"--container-image={box.image}",
            *([f"--container-mounts={','.join(mounts)}"] if mounts else []),
            # What the image sets would else count before what the job sets.
            f"--container-env={','.join(dict.fromkeys(known))}",
            *(*box.args, *cluster.prefix, *inner),
        ]
    binds = [part for place in (*places, *box.binds) for part in ("--bind", place)]
    return [
        *(*cluster.prefix, box.runtime, "exec"),
        *(["--nv"] if cluster.gpus_per_node else []),
        # Home is seen inside, and with it packages that were installed there for another Python.
        *("--env", "PYTHONNOUSERSITE=1", *binds, *box.args, box.image, *inner),
    ]


def _mount(bind: str) -> str:
    """A bind in pyxis' words, which has no short form."""
    return bind if ":" in bind else f"{bind}:{bind}"
