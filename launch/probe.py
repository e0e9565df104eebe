"""A first profile of a cluster from what SLURM says of itself: `python launch/submit.py --probe --cluster NAME`.

    answers = ask(10.0)                              # a few bounded questions: sinfo, scontrol, sacctmgr
    site = read(answers)                             # pure from here on
    text = profile(site, choose(site), "2026-11-24")

Every choice is written with where it comes from, what nobody can know from a login node as a comment to fill in.
Where there is no accounting (sacctmgr), accounts and qualities of service stay open.
"""

import getpass
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import yaml

from launch import slurm
from launch.cluster import Cluster, gpu_memory_gb
from vitdist import config, rundir
from vitdist.config import SettingsError

# ---- the questions -------------------------------------------------------------------------------


class Answers(NamedTuple):
    """What the commands print; "" for one that is missing, fails or is silent."""

    sinfo: str
    partitions: str
    config: str
    associations: str = ""
    user: str = ""
    qos: str = ""
    srun: str = ""


def ask(patience_s: float, user: str) -> Answers:
    """Put the questions to SLURM, each of them bounded."""

    def answer(*command: str) -> str:
        return slurm.ask(list(command), patience_s) or ""

    sinfo = answer("sinfo", "-h", "-a", "-e", "-o", "%P|%a|%D|%c|%m|%G|%l|%T")
    if not sinfo:  # it will say no more to the others
        return Answers("", "", "")
    return Answers(
        sinfo,
        answer("scontrol", "show", "partition", "-o"),
        answer("scontrol", "show", "config"),
        answer("sacctmgr", "-nP", "show", "assoc", f"user={user}", "format=Account,Partition,QOS,DefaultQOS"),
        answer("sacctmgr", "-nP", "show", "user", user, "format=DefaultAccount"),
        answer("sacctmgr", "-nP", "show", "qos", "format=Name,MaxWall"),
        answer("srun", "--help"),
    )


# ---- the answers ---------------------------------------------------------------------------------


class Kind(NamedTuple):
    """Nodes of a partition that are alike."""

    number: int
    down: int
    """How many of them are down or drained now."""
    cpus: int
    memory_mb: int
    gpus: int
    types: tuple[str, ...]


@dataclass(frozen=True)
class Partition:
    """What SLURM says of one."""

    name: str
    default: bool = False
    up: bool = True
    minutes: int | None = None
    """Its longest job; None: no limit."""
    kinds: tuple[Kind, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)
    """All that `scontrol show partition` says."""

    @property
    def gpus(self) -> int:
        return sum(kind.number * kind.gpus for kind in self.kinds)

    @property
    def nodes(self) -> int:
        return sum(kind.number for kind in self.kinds)

    def allows(self, what: str, name: str) -> bool:
        """Whether an account (`what`: Accounts) or a quality of service (Qos) may use it."""
        allowed, denied = self.facts.get(f"Allow{what}", "ALL"), self.facts.get(f"Deny{what}", "")
        return (allowed == "ALL" or name in allowed.split(",")) and name not in denied.split(",")

    def summary(self) -> str:
        """In one line."""
        limit = "no limit" if self.minutes is None else written(self.minutes)
        kinds = ", ".join(
            f"{kind.number} x ({_gpus(kind)}{kind.cpus} cores, {kind.memory_mb / 1e3:.0f} GB)"
            + (f", {kind.down} of them down" if kind.down else "")
            for kind in self.kinds
        )
        marks = "".join((" (default)" if self.default else "", "" if self.up else " (down)"))
        return f"{self.name}{marks}: {kinds}; time {limit}"


class Association(NamedTuple):
    """What the user may charge."""

    account: str
    partition: str
    """"" for all."""
    qos: tuple[str, ...]
    default_qos: str


class Site(NamedTuple):
    cluster: str
    version: str
    partitions: tuple[Partition, ...]
    config: dict[str, str]
    associations: tuple[Association, ...]
    default_account: str
    walls: dict[str, int]
    """Longest job of a quality of service in minutes, where there is a limit."""
    pyxis: bool


def read(answers: Answers) -> Site:
    """What the answers say; what is not understood is left out."""
    partitions = _partitions(answers.sinfo, answers.partitions)
    facts: dict[str, str] = {}
    for line in answers.config.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            facts[name.strip()] = value.strip()
    associations = []
    for line in answers.associations.splitlines():
        parts = line.strip().split("|")
        if len(parts) >= 4 and parts[0]:
            associations.append(Association(parts[0], parts[1], tuple(filter(None, parts[2].split(","))), parts[3]))
    walls = {}
    for line in answers.qos.splitlines():
        name, _, wall = line.strip().partition("|")
        try:
            walls[name] = slurm.minutes(wall)
        except ValueError:  # none
            continue
    return Site(
        cluster=facts.get("ClusterName", ""),
        version=facts.get("SLURM_VERSION", ""),
        partitions=partitions,
        config=facts,
        associations=tuple(associations),
        default_account=answers.user.strip().splitlines()[0].strip("|") if answers.user.strip() else "",
        walls=walls,
        pyxis="--container-image" in answers.srun,
    )


_DOWN = re.compile(r"down|drain|fail|maint|unk|inval|powered_down|power_down|reboot", re.IGNORECASE)


def _partitions(sinfo: str, scontrol: str) -> tuple[Partition, ...]:
    facts = {}
    for line in scontrol.splitlines():
        pairs = dict(re.findall(r"(\w+)=(\S*)", line))
        if "PartitionName" in pairs:
            facts[pairs["PartitionName"]] = pairs
    kinds: dict[str, Counter[tuple[int, int, int, tuple[str, ...]]]] = {}
    down: Counter[tuple[str, tuple[int, int, int, tuple[str, ...]]]] = Counter()
    about: dict[str, tuple[bool, bool, int | None]] = {}
    for line in sinfo.splitlines():
        parts = line.strip().split("|")
        if len(parts) != 8 or not parts[2].isdigit():
            continue
        name, availability, count, cpus, memory, gres, limit, state = parts
        default, name = name.endswith("*"), name.removesuffix("*")
        gpus, types = slurm.gpus(gres)
        alike = (_whole(cpus), _whole(memory), gpus, types)
        kinds.setdefault(name, Counter())[alike] += int(count)
        down[name, alike] += int(count) if _DOWN.match(state) else 0
        try:
            longest = slurm.minutes(limit)
        except ValueError:  # infinite, n/a
            longest = None
        about[name] = default, availability == "up", longest
    return tuple(
        Partition(
            name,
            *about[name],
            tuple(Kind(number, down[name, alike], *alike) for alike, number in kinds[name].items()),
            facts.get(name, {}),
        )
        for name in kinds
    )


def _whole(text: str) -> int:
    """`96`, or `64+` where nodes differ, or nothing that is a number."""
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0


def _gpus(kind: Kind) -> str:
    return f"{kind.gpus} GPUs{' ' + '+'.join(kind.types) if kind.types else ''}, " if kind.gpus else ""


def written(minutes: int) -> str:
    """A time limit in SLURM's words: 12:00:00, 2-00:00:00."""
    days, rest = divmod(minutes, 24 * 60)
    clock = f"{rest // 60:02}:{rest % 60:02}:00"
    return f"{days}-{clock}" if days else clock


# ---- the choices ---------------------------------------------------------------------------------

USUAL_MINUTES, LEAST_MINUTES = 12 * 60, 10
"""A start of half a day: long against what a restart costs, short enough to be fitted in between others."""
_SIDE = re.compile(r"debug|test|devel|inter|jupyter|short|mig|class|login", re.IGNORECASE)
_SLICE = re.compile(r"\d+g\.\d+gb|mig", re.IGNORECASE)


class Choice(NamedTuple):
    """A line of the profile; `value` None: commented out, with an example in its place."""

    name: str
    value: str | int | bool | None
    why: str
    example: str = ""


def choose(site: Site) -> list[Choice]:
    """A value for each field that SLURM's answers decide, with the reason. Raises SettingsError if nothing can run."""
    usable = [p for p in site.partitions if _usable(p, site) and p.kinds]
    if not usable:
        raise SettingsError(
            "SLURM shows no partition that is up, open to your accounts and has a time limit of at least "
            f"{LEAST_MINUTES} minutes; see: sinfo -a"
        )
    partition = max(usable, key=_worth)
    account, qos, limit, why_limit = _account(partition, site)
    alike_nodes = Counter[tuple[int, tuple[str, ...]]]()
    for kind in partition.kinds:
        alike_nodes[kind.gpus, kind.types] += kind.number
    (gpus, types), nodes = max(alike_nodes.items(), key=lambda item: (item[0][0] * item[1], item[1]))
    alike = [kind for kind in partition.kinds if (kind.gpus, kind.types) == (gpus, types)]
    all_types = sorted({name for kind in partition.kinds for name in kind.types})
    cpus = max(1, min(kind.cpus for kind in alike))
    return [
        _partition_choice(partition, usable),
        account,
        qos,
        *_gpu_choices(partition, gpus, types, nodes, all_types, site),
        Choice("cpus_per_task", cpus, "all cores of such a node, as SLURM counts them (sinfo %c)"),
        _memory(partition, site),
        Choice("exclusive", None, _sharing(partition), "true"),
        Choice("time", written(limit), why_limit),
        Choice("signal_delay_s", 120, _signals(site, partition)),
    ]


def _usable(partition: Partition, site: Site) -> bool:
    facts = partition.facts
    long_enough = partition.minutes is None or partition.minutes >= LEAST_MINUTES
    closed = facts.get("RootOnly") == "YES" or facts.get("State", "UP") not in ("UP", "DRAIN")
    accounts = {a.account for a in site.associations if a.partition in ("", partition.name)}
    open_ = not site.associations or any(partition.allows("Accounts", account) for account in accounts)
    plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,:+=@/-]*", partition.name) is not None
    return partition.up and long_enough and not closed and open_ and plain


def _worth(partition: Partition) -> tuple[bool, bool, bool, int, int]:
    whole = any(kind.gpus and not all(map(_SLICE.search, kind.types or ("",))) for kind in partition.kinds)
    return (whole, not _SIDE.search(partition.name), partition.default, partition.gpus, partition.nodes)


def _partition_choice(partition: Partition, usable: Sequence[Partition]) -> Choice:
    if partition.default:
        why = "the cluster's default" + (", and it has GPUs" if partition.gpus else "; no partition shows GPUs")
    elif partition.gpus:
        why = "the most GPUs of those that are open to you" if len(usable) > 1 else "the only one that is open to you"
    else:
        why = "no partition shows GPUs; this one has the most nodes"
    return Choice("partition", partition.name, why)


def _account(partition: Partition, site: Site) -> tuple[Choice, Choice, int, str]:
    """Account, quality of service, the time limit and its reason."""
    mine = [a for a in site.associations if a.partition in ("", partition.name)]
    fit = [a for a in mine if partition.allows("Accounts", a.account)]
    limit, why = USUAL_MINUTES, "of one start, half a day: a run that is not done saves, requeues and goes on"
    if partition.minutes is not None and partition.minutes < limit:
        limit, why = partition.minutes, f"the partition's limit is {written(partition.minutes)}"
    elif partition.minutes is not None:
        why += f"; the partition's limit is {written(partition.minutes)}"
    if not fit:
        known = "accounting (sacctmgr) says nothing of you here: needed where the site charges somebody"
        nothing = Choice("account", None, known, "my-project")
        return nothing, Choice("qos", None, "as for the account", "normal"), limit, why
    chosen = next((a for a in fit if a.account == site.default_account), fit[0])
    accounts = sorted({a.account for a in fit})
    reason = "your default account" if chosen.account == site.default_account else "the partition takes it"
    others = [name for name in accounts if name != chosen.account]
    account = Choice("account", chosen.account, reason + (f"; also yours: {', '.join(others)}" if others else ""))
    default = chosen.default_qos or (chosen.qos[0] if len(chosen.qos) == 1 else "")
    allowed = [name for name in chosen.qos if partition.allows("Qos", name)]
    if default and default not in allowed and allowed:
        qos = Choice("qos", allowed[0], f"the partition does not take your default, {default}")
        default = allowed[0]
    else:
        qos = Choice("qos", None, f"yours: {', '.join(chosen.qos) or 'none'}", default or "normal")
    wall = site.walls.get(default)
    if wall is not None and wall < limit:
        limit, why = wall, f"the limit of the quality of service {default} is {written(wall)}"
    return account, qos, limit, why


def _gpu_choices(
    partition: Partition, gpus: int, types: tuple[str, ...], nodes: int, all_types: list[str], site: Site
) -> Iterable[Choice]:
    if not gpus:
        yield Choice("gpus_per_node", 0, "SLURM shows no GPUs here (sinfo %G); write their number if there are some")
        yield Choice("gpu_type", None, "where there are several", "a100")
        return
    counts = sorted({kind.gpus for kind in partition.kinds if kind.gpus})
    several = f"; other nodes have {', '.join(str(n) for n in counts if n != gpus)}" if len(counts) > 1 else ""
    yield Choice("gpus_per_node", gpus, f"of {nodes} nodes (sinfo %G){several}")
    if len(all_types) > 1 and len(types) == 1:
        others = ", ".join(name for name in all_types if name != types[0])
        yield Choice("gpu_type", types[0], f"most GPUs are of it; also here: {others}, and ranks must be alike")
    else:
        only = f"all are {', '.join(types)}" if types else "SLURM names no type"
        yield Choice("gpu_type", None, only, ",".join(types) or "a100")
    known = gpu_memory_gb(Cluster(), types)
    if known and known[0] < known[1]:
        what = f"they were sold with {known[0]:g} and {known[1]:g}: `nvidia-smi` on a node tells"
        yield Choice("gpu_memory_gb", None, what, f"{known[0]:g}")
    else:
        what = "as the type's name tells" if known else "`nvidia-smi` on a node tells"
        yield Choice("gpu_memory_gb", None, what, f"{known[0]:g}" if known else "80")
    select = site.config.get("SelectType", "")
    if select in ("select/cons_res", "select/linear"):
        yield Choice("gpu_request", "gres", f"{select} does not know --gpus-per-node (SelectType)")
    else:
        yield Choice("gpu_request", None, "where --gpus-per-node is refused", "gres")


def _memory(partition: Partition, site: Site) -> Choice:
    most = partition.facts.get("MaxMemPerNode", "UNLIMITED")
    if most.isdigit() and int(most) >= 1000:
        return Choice("mem_gb", int(most) // 1024, f"the partition's MaxMemPerNode is {most} MB")
    counted = "MEMORY" in site.config.get("SelectTypeParameters", "").upper()
    return Choice("mem_gb", "all", "--mem=0, the whole node's" + ("" if counted else "; memory is not counted here"))


def _sharing(partition: Partition) -> str:
    if partition.facts.get("OverSubscribe", "").startswith("EXCLUSIVE"):
        return "not needed: this partition gives whole nodes anyway"
    return "no other job on the nodes; not needed where all GPUs are taken"


def _signals(site: Site, partition: Partition) -> str:
    said = "warned so long before the limit: more than a checkpoint takes"
    modes = {partition.facts.get("PreemptMode", "OFF"), site.config.get("PreemptMode", "OFF")} - {"OFF"}
    if modes and "preempt_send_user_signal" not in site.config.get("SlurmctldParameters", ""):
        wait = site.config.get("KillWait", "30 sec")
        said += f". A preemption here sends TERM alone and kills after GraceTime and {wait} (KillWait)"
    return said


# ---- the profile ---------------------------------------------------------------------------------


def profile(site: Site, choices: Sequence[Choice], date: str, apptainer: bool = False) -> str:
    """The YAML of a profile."""
    taken = next(choice.value for choice in choices if choice.name == "partition")
    lines = [
        f"# {site.cluster or 'A cluster'}: written by `python launch/submit.py --probe` on {date}, by what SLURM "
        f"{site.version} said.",
        "# Yours from here on: all fields and what they are for stand in docs/your-cluster.md.",
        "#",
        *(f"#   {'*' if p.name == taken else ' '} {p.summary()}" for p in site.partitions),
        "",
    ]
    shown = [(_line(choice), choice.why) for choice in choices]
    width = min(40, max(len(line) for line, _ in shown))
    lines += [f"{line:{width}}  # {why}" for line, why in shown]
    disk = site.config.get("TmpFS", "/tmp")
    lines += [
        "",
        "# What only the site or you can know; see docs/your-cluster.md:",
        "# setup: [module load cuda]",
        "# network_interface: ib0           # `ip -br addr` on a compute node; where NCCL chooses a wrong one",
        "# infiniband: mlx5_0,mlx5_1        # `ibstat -l` on a compute node",
        f"# node_disk: {disk:<22} # a disk of each node for shards, if it is one and no memory (TmpFS)",
        "# hf_home: /shared/huggingface     # weights; default: your shell's HF_HOME, else ~/.cache/huggingface",
    ]
    if site.pyxis or apptainer:
        runtime, image = ("pyxis", "/shared/vitdist.sqsh") if site.pyxis else ("apptainer", "/shared/vitdist.sif")
        found = "srun knows --container-image" if site.pyxis else "apptainer is in PATH here"
        lines.append(f"# container: {{runtime: {runtime}, image: {image}}}   # {found}")
    return "\n".join(lines) + "\n"


def _line(choice: Choice) -> str:
    return f"# {choice.name}: {choice.example}" if choice.value is None else f"{choice.name}: {_scalar(choice.value)}"


def _scalar(value: str | int | bool) -> str:
    """A value as YAML reads it back: quoted unless it is a word that can be nothing else."""
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", value):
        return json.dumps(value)
    if isinstance(value, str) and value.lower() in ("null", "true", "false", "on", "off", "yes", "no", "n", "y"):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- the command ---------------------------------------------------------------------------------


def run(cluster: str, folder: Path, patience_s: float, yes: bool, dry: bool) -> int:
    """`--probe`: write folder/NAME.yaml and tell what it says; returns the exit code. Raises SettingsError.

    `cluster`: a name, or the path of a .yaml; "auto" takes the cluster's own name. `yes`: replace a file that is there.
    `dry`: print the profile, write nothing.
    """
    if not shutil.which("sinfo"):
        raise SettingsError("sinfo: not in PATH; run --probe on a login node of the cluster")
    answers = ask(patience_s, getpass.getuser())
    if not answers.sinfo:
        raise SettingsError(f"SLURM does not answer (sinfo) within {patience_s:g} s; try again, or see: sinfo")
    site = read(answers)
    path = _path(cluster, site, folder)
    choices = choose(site)
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    text = profile(site, choices, date, apptainer=bool(shutil.which("apptainer") or shutil.which("singularity")))
    config.parse(Cluster, yaml.safe_load(text), path)
    if dry:
        print(text, end="")
        return rundir.EXIT_DONE
    if path.exists() and not yes:
        ways = "--yes replaces it, --dry-run prints what it would become, --cluster NAME writes another"
        raise SettingsError(f"{path} exists: {ways}")
    try:
        rundir.publish(path, text)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be written: {error.strerror}; --cluster PATH.yaml writes elsewhere"
        ) from None
    told = [choice for choice in choices if choice.value is not None]
    names, values = max(len(c.name) for c in told), max(len(_scalar(c.value or 0)) for c in told)
    print(f"{path}: the profile of {site.cluster or 'this cluster'}, SLURM {site.version}")
    for choice in told:
        value = "" if choice.value is None else _scalar(choice.value)
        print(f"  {choice.name:{names}}  {value:{values}}  {choice.why}")
    print("Not known from here, in the file as comments: " + ", ".join(c.name for c in choices if c.value is None))
    print(f"Look at it, then try it:  python launch/submit.py --cluster {_said(path, folder)} --nodes 1 --dry-run")
    return rundir.EXIT_DONE


def _path(cluster: str, site: Site, folder: Path) -> Path:
    if cluster in ("auto", "local"):
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", site.cluster).strip("-.") or "mine"
        return folder / f"{name}.yaml"
    if "/" in cluster or cluster.endswith((".yaml", ".yml")):
        path = Path(cluster).expanduser().absolute()
        if path.suffix not in (".yaml", ".yml"):
            raise SettingsError(f"--cluster {cluster}: give a name, or the path of a .yaml")
        if not path.parent.is_dir():
            raise SettingsError(f"--cluster {cluster}: {path.parent} is no folder")
        return path
    try:
        return folder / f"{rundir.check_name(cluster)}.yaml"
    except ValueError:
        raise SettingsError(
            f"--cluster {cluster!r}: use letters, digits, '.', '_' and '-', or the path of a .yaml"
        ) from None


def _said(path: Path, folder: Path) -> str:
    """How `--cluster` names the file again."""
    return path.stem if path.parent == folder else str(path)
