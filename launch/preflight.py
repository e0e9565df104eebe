"""What can be known wrong before anything is queued: one small function a check, every fault told at once.

    case = Case(settings, run, nodes, processes, cluster, slurm, env=environment)
    for finding in preflight.check(case): print(finding)          # "error: data.val: ... [shards]"
    preflight.fetch(case, print)                                  # weights into the cache that the nodes share

A check looks, it makes nothing: `--dry-run` runs them too. Each can be left out by its name (`--skip shards`). Own
checks take milliseconds; what SLURM, quotas and the hub are asked is bounded. Imports no torch and opens no shard.
"""

import difflib
import functools
import getpass
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from launch import cluster as clusters
from launch import disks, hub
from launch.cluster import Cluster
from launch.disks import Mount
from launch.slurm import Slurm, ask, test_only
from vitdist import memory, rundir, shapes
from vitdist.config import WEIGHTS_FILES, Config, SettingsError
from vitdist.rundir import RunDir


@dataclass(frozen=True)
class Finding:
    """`refuse`: the run would fail; `warn`: it may; `note`: what the user should know."""

    level: Literal["refuse", "warn", "note"]
    text: str
    check: str = ""
    """Name of the check that found it, which `--skip` leaves out."""

    def __str__(self) -> str:
        start = {"refuse": "error: ", "warn": "warning: ", "note": ""}[self.level]
        return start + self.text + (f" [{self.check}]" if self.check and self.level != "note" else "")


@dataclass(frozen=True)
class Case:
    """A start that is to be looked at."""

    settings: Config
    run: RunDir
    nodes: int
    processes: int
    """Ranks on each node."""
    cluster: Cluster | None = None
    """None: a run on this machine."""
    slurm: Slurm | None = None
    """What sinfo said; None: nothing."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Of the shell that submits, without what a surrounding job left there."""
    script: str | None = None
    """What sbatch would get, to be tried with `--test-only`; None: not tried."""
    points: int = 1
    """Runs of this size that are started together."""
    dry: bool = False
    """Ask nobody who may be slow."""
    patience_s: float = 10.0
    """For an answer of SLURM or of a quota."""


def check(case: Case, skip: Iterable[str] = ()) -> list[Finding]:
    """All findings of all checks but those in `skip`; notes only where nothing refuses."""
    _index.cache_clear()
    found: list[Finding] = []
    for name, look in CHECKS.items():
        if name in skip:
            continue
        try:
            findings = list(look(case))
        except OSError as error:  # a file system that is away, a folder that may not be read
            findings = [Finding("warn", f"could not be looked at: {error.filename or ''} {error.strerror or error}")]
        found += [replace(finding, check=name) for finding in findings]
    if any(finding.level == "refuse" for finding in found):
        return [finding for finding in found if finding.level != "note"]  # nothing is started that they would tell of
    return found


def skipped(texts: Sequence[str]) -> frozenset[str]:
    """The checks that `--skip NAME[,NAME]` names. Raises SettingsError for unknown ones."""
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    faults = []
    for name in names:
        if name not in CHECKS:
            near = difflib.get_close_matches(name, CHECKS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(CHECKS)}"
            faults.append(f"--skip {name}: no such check; {hint}")
    if faults:
        raise SettingsError("\nerror: ".join(faults))
    return frozenset(names)


# ---- data ----------------------------------------------------------------------------------------


def shards(case: Case) -> Iterator[Finding]:
    """Training and validation shards are there, indexed and not empty."""
    digests: dict[str, str] = {}
    for name, place in _sets(case.settings):
        record, fault = _index(Path(place))
        if fault:
            yield Finding("refuse", f"data.{name}: {fault}")
        elif not record.get("samples"):
            yield Finding("refuse", f"data.{name}: {place}: its index names no pictures; run: vitdist index {place}")
        else:
            digests.setdefault(record.get("digest", place), name)
            if name == "val" and digests[record.get("digest", place)] == "train":
                yield Finding("warn", "data.val is among data.train: the validation samples are trained on too")


def classes(case: Case) -> Iterator[Finding]:
    """Training set, validation set and a checkpoint's kept head have the same classes."""
    settings = case.settings
    known: dict[str, list[str]] = {}
    for _, place in _sets(settings):
        record, fault = _index(Path(place))
        if not fault and record.get("samples"):
            known[place] = record.get("classes", [])
    if len({tuple(names) for names in known.values()}) < 2:
        single = [names[0] for names in known.values() if len(names) == 1]
        if single:
            yield Finding("refuse", f"data: a single class, {single[0]!r}: there is nothing to tell apart")
        elif known:
            names = next(iter(known.values()))
            yield from _class_names(settings, names)
            yield from _head(case, names)
        return
    (first, names), *others = known.items()
    other, its_names = next(item for item in others if item[1] != names)
    odd = sorted(set(names) ^ set(its_names))
    what = f"differ in the classes {', '.join(odd[:5])}" if odd else "have their classes in different orders"
    pair = "data.train and data.val" if settings.data.val in (first, other) else "the sets of data.train"
    yield Finding("refuse", f"{pair} {what}: pack both with one `vitdist pack FOLDER OUT`")


def _sets(settings: Config) -> list[tuple[str, str]]:
    """(train or val, folder) of the sets on a disk: a server may be in reach of the compute nodes alone."""
    train = [] if settings.data.stream else [("train", place) for place in settings.data.train_sets]
    return [(name, place) for name, place in (*train, ("val", settings.data.val)) if "://" not in place]


def _class_names(settings: Config, names: list[str]) -> Iterator[Finding]:
    """Settings that speak of classes know those of the data."""
    shares, weights = settings.data.class_shares, settings.loss.class_weights
    unsure = settings.evaluation.unsure
    costs = (unsure and unsure.costs) or {}
    said = {
        "data.class_shares": [] if isinstance(shares, str) else list(shares),
        "loss.class_weights": [] if isinstance(weights, str) else list(weights),
        "evaluation.unsure.costs": [name for true, row in costs.items() for name in (true, *row)],
    }
    for where, wanted in said.items():
        for name in dict.fromkeys(wanted):
            if name not in names:
                yield Finding("refuse", f"{where}: there is no class {name!r}; there are: {', '.join(names[:20])}")


def _head(case: Case, names: list[str]) -> Iterator[Finding]:
    """What becomes of a checkpoint's classifier, by the rules of model.head; see model.py."""
    told, rule = _configuration(case), case.settings.model.head
    if told is None or rule == "new":
        return
    source = case.settings.model.pretrained
    made_for = told.get("architectures") or []
    headed = not made_for or any("ForImageClassification" in name for name in made_for)
    labels = told.get("id2label")
    its_names = list(labels.values()) if isinstance(labels, dict) else []
    size = len(its_names) or told.get("num_labels", 2)
    if rule == "keep":
        if not headed or size != len(names):
            held = f"a head of {size} classes" if headed else "no head"
            yield Finding("refuse", f"model.head=keep: {source} has {held}, where one of {len(names)} is needed")
        return
    if not headed or not its_names or all(str(n).startswith("LABEL_") for n in its_names):
        return
    missing, extra = sorted(set(names) - set(its_names)), sorted(set(its_names) - set(names))
    if (missing or extra) and len(set(names) & set(its_names)) * 2 > max(len(names), len(its_names)):
        odd = ", ".join(str(n) for n in [*missing, *extra][:5])
        yield Finding("warn", f"the head of {source} begins anew: its classes and those of the data differ in {odd}")


@functools.cache  # for one look: a shared file system is slow to ask for the lengths of thousands of shards
def _index(folder: Path) -> tuple[dict[str, Any], str]:
    """What index.json says, and what is wrong ("" if nothing)."""
    if not folder.is_dir():
        return {}, f"{folder}: no such folder; to make it of pictures run: vitdist pack FOLDER {folder.parent}"
    try:
        record = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("not a record")
    except FileNotFoundError:
        record = {}
    except (OSError, ValueError) as error:
        return {}, f"{folder}/index.json cannot be read ({error}); run: vitdist index {folder}"
    if not record.get("base") and not any(folder.glob("*.tar")):  # `base`: the shards lie elsewhere
        inside = [path for path in (folder / "train", folder / "val") if any(path.glob("*.tar"))]
        hint = f"did you mean {inside[0]}?" if inside else f"if it holds pictures, run: vitdist pack {folder} OUT"
        return {}, f"{folder}: holds no shards (*.tar); {hint}"
    if not record:
        return {}, f"{folder}: its shards have no index; run: vitdist index {folder}"
    for shard in [] if record.get("base") else record.get("shards", []):
        path = folder / str(shard.get("name"))
        if not path.is_file() or path.stat().st_size != shard.get("bytes"):
            what = "is missing" if not path.is_file() else "is not as long as indexed"
            return {}, f"{path} {what}: bring it back, or save what is whole: vitdist verify {folder} --repair OUT"
    return record, ""


# ---- model ---------------------------------------------------------------------------------------


def weights(case: Case) -> Iterator[Finding]:
    """The checkpoint is there, or can be fetched, and what a file of weights does not tell is set."""
    model, data = case.settings.model, case.settings.data
    if model.warm_start and not os.path.exists(model.warm_start):
        yield Finding("refuse", f"model.warm_start: {model.warm_start}: no such run or checkpoint")
    if name := clusters.from_hub(case.settings):
        yield from _of_hub(case, name)
        return
    if model.pretrained is None:
        return
    path = Path(model.pretrained)
    if not path.exists():
        yield Finding("refuse", f"model.pretrained: {path}: no such file or folder")
    elif path.is_dir():
        if not (path / "config.json").exists():
            inside = sorted(p.name for p in path.iterdir() if p.name.endswith(WEIGHTS_FILES))
            hint = f"did you mean {path / inside[0]}?" if inside else "give a folder that `save_pretrained` made"
            yield Finding("refuse", f"model.pretrained: {path}: has no config.json; {hint}")
    else:
        usual = {
            "model.heads": (model.heads, "3, 6, 12, 16 in ViT-Ti, S, B, L"),
            "model.layer_norm_eps": (model.layer_norm_eps, "1e-6 in timm, DeiT, MAE, DINO"),
            "data.mean": (data.mean, "[0.485, 0.456, 0.406] in DeiT, MAE, DINO"),
            "data.std": (data.std, "[0.229, 0.224, 0.225]"),
        }
        missing = [f"{name} ({hint})" for name, (value, hint) in usual.items() if value is None]
        if missing:
            what = f"a file of weights does not tell, so give: {'; '.join(missing)}"
            yield Finding("refuse", f"model.pretrained: {what}")


_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def _of_hub(case: Case, name: str) -> Iterator[Finding]:
    if not _HUB_ID.fullmatch(name):
        yield Finding(
            "refuse", f"model.pretrained: {name}: neither a folder here nor a name of Hugging Face (ORG/NAME)"
        )
        return
    folder = hub.cache_folder(case.cluster, case.env)
    if folder is None:
        home = case.cluster and case.cluster.hf_home
        yield Finding("refuse", f"hf_home {home}: holds a variable that is not set here; write it out in the profile")
    elif hub.cached(name, folder) is None:
        if hub.is_offline(case.env):
            what = f"model.pretrained: {name} is not in {folder}, and HF_HUB_OFFLINE forbids to fetch it"
            yield Finding("refuse", f"{what}; {_by_hand(name, folder)}")
        elif case.cluster:
            yield Finding("note", f"{name} is not in {folder}: it is fetched before the job is queued")


def _by_hand(name: str, folder: Path) -> str:
    home = f"HF_HOME={folder.parent} " if folder.name == "hub" else f"HF_HUB_CACHE={folder} "
    return f"where there is internet: {home}hf download {name}; or copy the model's folder and give its path"


def fetch(
    case: Case, say: Callable[[str], None], skip: Iterable[str] = (), endpoint: str | None = None
) -> list[Finding]:
    """Bring weights of the hub into the cache; returns what was wrong, and what the checks say now that they know them.

    Does nothing for what is there, for a run on this machine (which fetches by itself), and where `weights` is skipped.
    """
    name, folder = clusters.from_hub(case.settings), hub.cache_folder(case.cluster, case.env)
    if not name or not folder or not case.cluster or "weights" in skip or hub.cached(name, folder):
        return []
    try:
        hub.fetch(name, folder, say, endpoint)
    except hub.Unreachable as error:
        what = f"model.pretrained: {name} cannot be fetched from here ({error}); {_by_hand(name, folder)}"
        return [Finding("refuse", what, "weights")]
    _index.cache_clear()
    again = {"classes": classes, "memory": gpu_memory, "space": space, "time": time_limit}
    return [
        replace(finding, check=name)
        for name, look in again.items()
        if name not in skip
        for finding in look(case)
        if finding.level != "note"
    ]


def _snapshot(case: Case) -> Path | None:
    """The folder of the checkpoint, if it is one and is here."""
    if name := clusters.from_hub(case.settings):
        folder = hub.cache_folder(case.cluster, case.env)
        return folder and hub.cached(name, folder)
    start = case.settings.model.pretrained
    return Path(start) if start and not case.settings.model.weights_file else None


def _configuration(case: Case) -> dict[str, Any] | None:
    """The checkpoint's config.json; None where it has none that can be read."""
    folder = _snapshot(case)
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else None
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


# ---- memory --------------------------------------------------------------------------------------


def gpu_memory(case: Case) -> Iterator[Finding]:
    """What the run needs of a GPU's memory is there, as far as shapes and the GPU's type are known."""
    if not case.cluster or not case.cluster.gpus_per_node:
        return
    known = clusters.gpu_memory_gb(case.cluster, _gpu_types(case))
    net = known and _network(case)
    if not known or not net:
        return
    least, most = known
    world = case.nodes * case.processes
    try:
        found = memory.estimate(case.settings, net.classes, world, net=net)
        if memory.fits(found, least):
            return
        ways = memory.remedies(case.settings, net.classes, world, most, net=net)
    except SettingsError:  # the batch does not divide, which is told elsewhere
        return
    needs = f"a rank needs about {found.peak / memory.GB:.1f} GB at micro_batch {found.batch.micro_batch}"
    way = f"; try: {' '.join(ways[0].overrides)} ({ways[0].price})" if ways else "; nothing that is known makes it fit"
    if memory.fits(found, most):
        sure = "set gpu_memory_gb in the profile to be sure"
        yield Finding("warn", f"{needs}, and these GPUs have {least:g} or {most:g} GB: {sure}")
    else:
        yield Finding("refuse", f"{needs}, and these GPUs have {most:g} GB, of which a part is not for tensors{way}")


def _gpu_types(case: Case) -> list[str]:
    kinds = case.slurm.nodes(case.cluster.partition) if case.slurm and case.cluster else []
    return sorted({name for kind in kinds for name in kind.gpu_types})


def _network(case: Case) -> shapes.Network | None:
    """Names and shapes of the model; None where they cannot be known here."""
    model, folder = case.settings.model, _snapshot(case)
    if clusters.from_hub(case.settings) and not folder:
        return None
    number = next((len(_index(Path(place))[0].get("classes", [])) for _, place in _sets(case.settings)), 0)
    try:
        return shapes.network(model.model_copy(update={"pretrained": str(folder)} if folder else {}), number or 1000)
    except ValueError:  # Unknown, or what the trainer will say better
        return None


# ---- places --------------------------------------------------------------------------------------


def folder(case: Case) -> Iterator[Finding]:
    """The run folder can be made, and lies with all that the run reads where the nodes see it."""
    runs = case.run.path.parent
    place = disks.existing(case.run.path)
    if not place.is_dir():
        yield Finding("refuse", f"--runs {runs}: {place} is a file; choose another folder")
        return
    if not os.access(place, os.W_OK | os.X_OK):
        yield Finding("refuse", f"--runs {runs}: you may not write in {place}; choose another folder with --runs")
    if case.cluster:
        yield from _shared(case)


def _shared(case: Case) -> Iterator[Finding]:
    """Paths on disks of this machine alone, unless it is the only node."""
    mounted = disks.mounts()
    wanted = [("the run folder", case.run.path)]
    wanted += [(f"data.{name}", Path(place)) for name, place in _sets(case.settings)]
    for name in ("pretrained", "warm_start"):
        start = getattr(case.settings.model, name)
        if start and start.startswith("/"):
            wanted.append((f"model.{name}", Path(start)))
    script = case.cluster.environment if case.cluster else None
    if script and script.startswith("/"):
        wanted.append(("the profile's environment", Path(script)))
    cache = clusters.from_hub(case.settings) and hub.cache_folder(case.cluster, case.env)
    if cache:
        wanted.append(("the cache of Hugging Face", cache))
    alone: dict[Mount, list[str]] = {}
    for what, path in wanted:
        mount = disks.mount_of(path, mounted)
        if mount and mount.shared is False:
            alone.setdefault(mount, []).append(f"{what} ({path})")
    if not alone or _only_here(case):
        return
    for mount, at in alone.items():
        kind = "memory" if mount.in_memory else "a disk"
        where = f"{mount.kind} at {mount.point}, {kind} of this machine, which other nodes may not see"
        verb = "lies" if len(at) == 1 else "lie"
        yield Finding("warn", f"{', '.join(at)} {verb} on {where}; a shared file system is needed")


def _only_here(case: Case) -> bool:
    """Whether all nodes are this machine, as in a cluster of one."""
    answer = ask(["sinfo", "-h", "-a", "-o", "%o"], case.patience_s) or ""
    here = {"127.0.0.1", "localhost", "::1", os.uname().nodename, os.uname().nodename.split(".")[0]}
    return bool(answer.strip()) and {address.strip() for address in answer.splitlines()} <= here


MARGIN_BYTES, MARGIN_FILES = 10**9, 1_000
"""For logs, metrics, pictures and the exported model, beside the checkpoints."""


def space(case: Case) -> Iterator[Finding]:
    """There is room for the checkpoints that are kept, on the disk, in the quota, and of files."""
    place = disks.existing(case.run.path)
    if not place.is_dir():
        return
    size, source = _checkpoint(case)
    # Those kept, the best, and the one that is being written.
    number = case.settings.checkpoint.keep + 2
    there = _bytes_of(case.run.checkpoints)
    need = (max(0, number * size - there) + MARGIN_BYTES) * case.points
    world = case.nodes * case.processes
    files = (number * (world + 2) + 4 * world + MARGIN_FILES) * case.points
    why = f"{number} checkpoints of {_shown(size)} ({source}) and logs" if size else "logs and checkpoints"
    limits = [(f"{place} has", disks.free(place))]
    mount = disks.mount_of(place, disks.mounts())
    if mount and not case.dry:
        limits += [("your quota leaves", room) for room in disks.quotas(mount, getpass.getuser(), case.patience_s)]
    for what, room in limits:
        if room.bytes is not None and room.bytes < need:
            level: Literal["refuse", "warn"] = "refuse" if room.bytes < need / 2 else "warn"
            away = "free some, keep fewer (checkpoint.keep), or choose another --runs"
            yield Finding(level, f"{what} {_shown(room.bytes)}, where {why} take {_shown(need)}: {away}")
        if room.files is not None and room.files < files:
            yield Finding("refuse", f"{what} room for {room.files:,} more files, and about {files:,} are needed")


def _shown(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"


def _checkpoint(case: Case) -> tuple[int, str]:
    """Bytes of a checkpoint and how they are known; 0 where they are not."""
    if saved := _saved(case.run):
        return int(saved["bytes"]), "as the last one"
    net = _network(case)
    if not net:
        return 0, ""
    # Of each trained scalar the fp32 weight, what the optimizer keeps of it, and the average; of others the weight.
    kinds = 1 + len(memory.moments(case.settings.optim)) + (case.settings.optim.ema > 0)
    return 4 * (kinds * net.trained + net.total - net.trained), "by its parameters"


def _saved(run: RunDir) -> dict[str, Any] | None:
    """What the newest attempt that saved says of it: seconds, bytes."""
    for attempt in reversed(run.attempts()):
        saved = (rundir.read_json(attempt.train) or {}).get("saved")
        if isinstance(saved, dict) and saved.get("bytes") and saved.get("seconds"):
            return saved
    return None


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("step-*/*")) if folder.is_dir() else 0


SLOW_BYTES_S = 0.5e9
"""Assumed of a shared file system with one run's ranks writing at once, where nothing was measured yet."""


def time_limit(case: Case) -> Iterator[Finding]:
    """The run has time to save between the signal and its end."""
    if not case.cluster:
        return
    saved, (size, _) = _saved(case.run), _checkpoint(case)
    seconds = float(saved["seconds"]) if saved else size / SLOW_BYTES_S
    # The node job keeps 15 s for the requeue; a step and the agreement of the ranks go first.
    room = case.cluster.signal_delay_s - 15
    if seconds * 1.5 <= room:
        return
    enough = min(3600, math.ceil((seconds * 1.5 + 15) / 30) * 30)
    how = "took" if saved else f"may take (at {SLOW_BYTES_S / 1e9:g} GB/s, assumed)"
    what = f"signal_delay_s {case.cluster.signal_delay_s}: a checkpoint {how} {seconds:.0f} s"
    level: Literal["refuse", "warn"] = "refuse" if saved and seconds > room else "warn"
    yield Finding(level, f"{what}, and the end of a start must leave time for one; set it to {enough} in the profile")


# ---- the cluster ---------------------------------------------------------------------------------


def commands(case: Case) -> Iterator[Finding]:
    """The commands of SLURM are in reach."""
    absent = [name for name in ("sbatch", "srun", "scontrol") if case.cluster and not shutil.which(name)]
    if absent:
        where = "submit on a login node of the cluster, or use --cluster local"
        yield Finding("refuse", f"{', '.join(absent)}: not in PATH; {where}")


def partition(case: Case) -> Iterator[Finding]:
    """The profile's partitions exist."""
    if not case.cluster:
        return
    if not case.slurm:
        if not list(commands(case)):
            yield Finding("warn", "SLURM does not answer (sinfo), so partition, nodes and GPUs are not checked")
        return
    for name in case.slurm.missing(case.cluster.partition):
        what = f"partition {name}: this cluster has none of that name; {case.slurm.near(name)}"
        yield Finding("refuse", what)


def capacity(case: Case) -> Iterator[Finding]:
    """The partition is large enough and its limit long enough: SLURM itself would let the job wait for ever."""
    cluster, slurm = case.cluster, case.slurm
    kinds = slurm.nodes(cluster.partition) if slurm and cluster else []
    if not kinds or not cluster or cluster.gpus_per_node == "auto":
        return
    name = cluster.partition or (slurm.default if slurm else None)
    counted = cluster.gpus_per_node if cluster.gpu_request != "none" else 0
    types = sorted({kind_ for kind in kinds for kind_ in kind.gpu_types})
    if counted and cluster.gpu_type and types and cluster.gpu_type not in types:
        near = difflib.get_close_matches(cluster.gpu_type, types, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(types)}"
        yield Finding("refuse", f"gpu_type {cluster.gpu_type}: partition {name} has none of that type; {hint}")
        return
    any_type = not cluster.gpu_type or not types
    fit = [kind for kind in kinds if kind.gpus >= counted and (any_type or cluster.gpu_type in kind.gpu_types)]
    able = sum(kind.number for kind in fit)
    if able < case.nodes:
        kind_ = f" {cluster.gpu_type}" if cluster.gpu_type else ""
        what = f" with {cluster.gpus_per_node}{kind_} GPUs" if counted else ""
        yield Finding("refuse", f"--nodes {case.nodes}: partition {name} has {able} nodes{what}")
    mixed = sorted({kind_ for kind in fit for kind_ in kind.gpu_types})
    if (
        counted
        and case.nodes > 1
        and len(mixed) > 1
        and not (cluster.gpu_type or cluster.constraint or cluster.exclude)
    ):
        what = f"partition {name} has nodes with {' and with '.join(mixed)}, and a job may get both"
        yield Finding("refuse", f"{what}: choose with gpu_type (or constraint) in the profile")
    longest = [kind.minutes for kind in kinds if kind.minutes is not None]
    if longest and cluster.minutes > max(longest):
        limit = max(longest)
        what = f"time {cluster.time}: partition {name} allows {limit} minutes; use --time {limit}"
        yield Finding("refuse", what)


def container(case: Case) -> Iterator[Finding]:
    """The profile's image, binds and scripts are there, as far as this machine sees them."""
    cluster = case.cluster
    if not cluster:
        return
    if cluster.environment and cluster.environment.startswith("/") and not os.access(cluster.environment, os.R_OK):
        yield Finding("refuse", f"environment: {cluster.environment}: no such file, or it may not be read")
    box = cluster.container
    if not box:
        return
    if box.image.startswith("/") and not os.path.exists(box.image):
        yield Finding("refuse", f"container.image: {box.image}: no such file")
    for bind in box.binds:
        if not os.path.exists(source := bind.split(":")[0]):
            yield Finding("warn", f"container.binds: {source} is not on this machine; the nodes must have it")
    for place in clusters.places(case.run, case.settings, cluster):
        if set(place) & set(",:"):
            yield Finding("refuse", f"{place}: a container cannot be given a path with a comma or colon")


def script(case: Case) -> Iterator[Finding]:
    """SLURM takes the job: partition, time, account and quality of service go together (`sbatch --test-only`)."""
    if case.script is None or not case.cluster or not shutil.which("sbatch"):
        return
    taken, said = test_only(case.script, case.patience_s, dict(case.env) if case.env else None)
    if taken is False:
        yield Finding("refuse", f"SLURM refuses the job: {said}")
    elif taken is None:
        yield Finding("warn", f"SLURM cannot say whether it takes the job: {said}")


# ---- tracking ------------------------------------------------------------------------------------


def tracking(case: Case) -> Iterator[Finding]:
    """Whether W&B will be online, by the key that is found; the key itself is not read out."""
    settings = case.settings.tracking
    if settings.wandb == "off":
        return
    hidden = case.cluster is not None and case.cluster.export == "none"
    key = _key(dict(case.env), variables=not hidden)
    if settings.wandb == "offline":
        how = "offline, as set"
    elif key:
        how = f"online, with the key in {key}" + ("; without internet on the nodes, offline" if case.cluster else "")
    elif settings.wandb == "online":
        where = " outside of your shell's variables, which export: none keeps from the job" if hidden else ""
        way = "run `wandb login`, or set tracking.wandb=offline"
        yield Finding("refuse", f"tracking.wandb=online: no API key is found{where}; {way}")
        return
    else:
        how = "offline, as no API key is found (`wandb login`)"
    later = f"; upload later: vitdist sync {case.run.path}" if how.startswith("offline") else ""
    yield Finding("note", f"W&B: {how}{later}")


def _key(env: Mapping[str, str], variables: bool) -> str | None:
    """Where W&B will find a key, in words; None: nowhere. Looks for names and places, never at a key."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if variables and env.get(name):
            return name
    home = Path(env.get("HOME") or Path.home())
    config_folder = Path(env.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb")
    own = _text(config_folder / "settings")
    if re.search(r"^\s*api_key\s*[=:]\s*\S", own, re.MULTILINE):
        return str(config_folder / "settings")
    told = re.search(r"^\s*base_url\s*[=:]\s*(\S+)", own, re.MULTILINE)
    url = env.get("WANDB_BASE_URL") or (told[1] if told else "") or "https://api.wandb.ai"
    netrc = Path(env.get("NETRC") or home / ".netrc")
    if re.search(rf"(?:^|\s)(?:machine\s+{re.escape(urlparse(url).hostname or '')}|default)\s", _text(netrc)):
        return str(netrc)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


CHECKS: dict[str, Callable[[Case], Iterable[Finding]]] = {
    "shards": shards,
    "classes": classes,
    "weights": weights,
    "memory": gpu_memory,
    "folder": folder,
    "space": space,
    "time": time_limit,
    "commands": commands,
    "partition": partition,
    "capacity": capacity,
    "container": container,
    "script": script,
    "tracking": tracking,
}
"""By the names that `--skip` takes."""


def describe() -> str:
    """The checks with what each looks at, for `--help`."""
    return "\n".join(f"  {name:10} {(look.__doc__ or '').split(chr(10))[0]}" for name, look in CHECKS.items())
