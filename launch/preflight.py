"""What can be known wrong before anything is queued: one small function a check, every fault told at once.

    for finding in preflight.check(settings, runs_folder, nodes, cluster, slurm): print(finding)

A check looks, it never makes anything: `--dry-run` runs them too. Imports no torch and opens no shard.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.cluster import Cluster
from launch.slurm import Slurm
from vitdist.config import WEIGHTS_FILES, Config


@dataclass(frozen=True)
class Finding:
    """`refuse`: the run would fail; `warn`: it may."""

    level: Literal["refuse", "warn"]
    text: str

    def __str__(self) -> str:
        return f"{'error' if self.level == 'refuse' else 'warning'}: {self.text}"


def check(settings: Config, runs: Path, nodes: int, cluster: Cluster | None, slurm: Slurm | None) -> list[Finding]:
    """All findings; `cluster` is None for a run on this machine."""
    found = [*shards(settings), *weights(settings), *writable(runs)]
    if cluster:
        found += [*sbatch(), *partition(cluster, slurm), *capacity(cluster, nodes, slurm)]
    return found


# ---- data ----------------------------------------------------------------------------------------


def shards(settings: Config) -> list[Finding]:
    """Training and validation shards are there, indexed, not empty and of the same classes.

    Only those on a disk are looked at: a server may be out of reach here and in reach of the compute nodes.
    """
    found: list[Finding] = []
    classes: dict[str, list[str]] = {}
    digests: dict[str, str] = {}
    wanted = [] if settings.data.stream else [("train", place) for place in settings.data.train_sets]
    for name, place in [*wanted, ("val", settings.data.val)]:
        if "://" in place:
            continue
        folder = Path(place)
        record, fault = _index(folder)
        if fault:
            found.append(Finding("refuse", f"data.{name}: {fault}"))
        elif not record.get("samples"):
            empty = f"data.{name}: {folder}: its index names no pictures; run: vitdist index {folder}"
            found.append(Finding("refuse", empty))
        else:
            classes[place] = record.get("classes", [])
            digests.setdefault(record.get("digest", place), name)
            if name == "val" and digests[record.get("digest", place)] == "train":
                found.append(Finding("warn", "data.val is among data.train: the validation samples are trained on too"))
    return found + _same_classes(settings, classes)


def _same_classes(settings: Config, classes: dict[str, list[str]]) -> list[Finding]:
    if len({tuple(names) for names in classes.values()}) < 2:
        single = [names[0] for names in classes.values() if len(names) == 1]
        text = f"data: a single class, {single[0]!r}: there is nothing to tell apart" if single else ""
        return [Finding("refuse", text)] if text else _class_names(settings, classes)
    (first, names), *others = classes.items()
    other, its_names = next(item for item in others if item[1] != names)
    odd = sorted(set(names) ^ set(its_names))
    what = f"differ in the classes {', '.join(odd[:5])}" if odd else "have their classes in different orders"
    pair = "data.train and data.val" if settings.data.val in (first, other) else "the sets of data.train"
    return [Finding("refuse", f"{pair} {what}: pack both with one `vitdist pack FOLDER OUT`")]


def _class_names(settings: Config, classes: dict[str, list[str]]) -> list[Finding]:
    """Settings that speak of classes know those of the data."""
    names = next(iter(classes.values()), None)
    if names is None:
        return []
    shares, weights = settings.data.class_shares, settings.loss.class_weights
    unsure = settings.evaluation.unsure
    costs = (unsure and unsure.costs) or {}
    said = {
        "data.class_shares": [] if isinstance(shares, str) else list(shares),
        "loss.class_weights": [] if isinstance(weights, str) else list(weights),
        "evaluation.unsure.costs": [name for true, row in costs.items() for name in (true, *row)],
    }
    return [
        Finding("refuse", f"{where}: there is no class {name!r}; there are: {', '.join(names[:20])}")
        for where, wanted in said.items()
        for name in dict.fromkeys(wanted)
        if name not in names
    ]


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


def weights(settings: Config) -> list[Finding]:
    """A local checkpoint is there, and what a file of weights does not tell is set. Hub ids are not looked up."""
    model, data = settings.model, settings.data
    if model.pretrained is None or not model.pretrained.startswith("/"):
        return []
    path = Path(model.pretrained)
    if not path.exists():
        return [Finding("refuse", f"model.pretrained: {path}: no such file or folder")]
    if path.is_dir():
        if (path / "config.json").exists():
            return []
        inside = sorted(p.name for p in path.iterdir() if p.name.endswith(WEIGHTS_FILES))
        hint = f"did you mean {path / inside[0]}?" if inside else "give a folder that `save_pretrained` made"
        return [Finding("refuse", f"model.pretrained: {path}: has no config.json; {hint}")]
    usual = {
        "model.heads": (model.heads, "3, 6, 12, 16 in ViT-Ti, S, B, L"),
        "model.layer_norm_eps": (model.layer_norm_eps, "1e-6 in timm, DeiT, MAE, DINO"),
        "data.mean": (data.mean, "[0.485, 0.456, 0.406] in DeiT, MAE, DINO"),
        "data.std": (data.std, "[0.229, 0.224, 0.225]"),
    }
    missing = [f"{name} ({hint})" for name, (value, hint) in usual.items() if value is None]
    if not missing:
        return []
    return [Finding("refuse", f"model.pretrained: a file of weights does not tell, so give: {'; '.join(missing)}")]


# ---- places --------------------------------------------------------------------------------------


def writable(runs: Path) -> list[Finding]:
    """The run folder can be made."""
    place = runs
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return [Finding("refuse", f"--runs {runs}: {place} is a file; choose another folder")]
    if not os.access(place, os.W_OK | os.X_OK):
        return [Finding("refuse", f"--runs {runs}: you may not write in {place}; choose another folder with --runs")]
    return []


def sbatch() -> list[Finding]:
    """The commands of SLURM are in reach."""
    absent = [name for name in ("sbatch", "srun", "scontrol") if not shutil.which(name)]
    if not absent:
        return []
    names = ", ".join(absent)
    return [Finding("refuse", f"{names}: not in PATH; submit on a login node of the cluster, or use --cluster local")]


def partition(cluster: Cluster, slurm: Slurm | None) -> list[Finding]:
    """The profile's partitions exist."""
    if not slurm:
        silent = "SLURM does not answer (sinfo), so partition, nodes and GPUs are not checked"
        return [Finding("warn", silent)] if not sbatch() else []
    return [
        Finding("refuse", f"partition {name}: this cluster has none of that name; {slurm.near(name)}")
        for name in slurm.missing(cluster.partition)
    ]


def capacity(cluster: Cluster, nodes: int, slurm: Slurm | None) -> list[Finding]:
    """The partition is large enough and its limit long enough: SLURM itself would let the job wait for ever."""
    kinds = slurm.nodes(cluster.partition) if slurm else []
    if not kinds or cluster.gpus_per_node == "auto":
        return []
    name = cluster.partition or (slurm.default if slurm else None)
    found: list[Finding] = []
    able = sum(kind.number for kind in kinds if kind.gpus >= cluster.gpus_per_node)
    if able < nodes:
        what = f" with {cluster.gpus_per_node} GPUs" if cluster.gpus_per_node else ""
        found.append(Finding("refuse", f"--nodes {nodes}: partition {name} has {able} nodes{what}"))
    longest = [kind.minutes for kind in kinds if kind.minutes is not None]
    if longest and cluster.minutes > max(longest):
        limit = max(longest)
        what = f"time {cluster.time}: partition {name} allows {limit} minutes; use --time {limit}"
        found.append(Finding("refuse", what))
    return found
