"""Checkpoints: a folder that appears whole, named by its step; the newest whole one is resumed.

    checkpoints/step-00000120/manifest.json     written last, then the folder is renamed into place
                              state/...         DeepSpeed's files of every rank
                              rng-R.pt          random state of rank R

Two traps of DeepSpeed are closed here. Its `latest` file is published before all ranks have
written: none is used. And it loads a checkpoint whose parameter groups have other members without
a word, after which layers hold each other's weights: the manifest holds a fingerprint of the groups.
"""

import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitdist import rundir
from vitdist.dist import Processes
from vitdist.rundir import RunDir

if TYPE_CHECKING:
    from vitdist.engine import Engine

_TAG = "state"


_SAID = {"data": "the digest of the training data (data.train with its shares)"}


class NoCheckpoint(ValueError):
    """Checkpoints exist but none can be resumed; the text names each with its reason."""


@dataclass(frozen=True)
class Identity:
    """What must be the same for a checkpoint to fit; each is compared by name."""

    optimizer: str
    world: int
    zero: int
    precision: str
    global_batch: int
    groups: str
    """Hash of group -> parameter names -> shapes, in order."""
    classes: str
    """Hash of the class list."""
    data: str
    """Digest of the training shards."""

    def first_difference(self, saved: dict[str, Any]) -> str | None:
        for name, mine in asdict(self).items():
            if saved.get(name) != mine:
                before, now = (str(value)[:12] if name == "data" else repr(value) for value in (saved.get(name), mine))
                return f"{_SAID.get(name, name)} was {before}, now {now}"
        return None


def fingerprint(groups: list[dict[str, Any]]) -> str:
    """Hash of ordered groups: name, scale, weight decay, and the names and shapes of their parameters."""
    text = json.dumps(
        [
            [
                g["name"],
                g["lr_scale"],
                g["weight_decay"],
                [[n, list(p.shape)] for n, p in zip(g["names"], g["params"], strict=True)],
            ]
            for g in groups
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def class_hash(classes: list[str]) -> str:
    return hashlib.sha256(json.dumps(classes).encode()).hexdigest()[:16]


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def steps(run: RunDir) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    if not run.checkpoints.is_dir():
        return []
    found = (re.fullmatch(r"step-(\d{8})", path.name) for path in run.checkpoints.iterdir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def save(
    run: RunDir,
    engine: "Engine",
    me: Processes,
    identity: Identity,
    attempt: int,
    keep: int,
    best: int | None = None,
) -> Path:
    """Write a checkpoint of the step just done; all ranks call it.

    Older ones go afterwards: the newest `keep` stay, and that of step `best` beside them.
    """
    final = run.checkpoints / name_of(engine.steps)
    temporary = run.checkpoints / f".tmp-{final.name}-{attempt}"
    if me.from_first(final.exists() if me.first else None):
        return final
    if me.first:
        run.checkpoints.mkdir(exist_ok=True)
        # No other process writes here: the lock of the run is held. So what is left over is dead.
        for left in run.checkpoints.glob(".tmp-*"):
            shutil.rmtree(left)
        temporary.mkdir()
    me.barrier()
    engine.save(temporary, _TAG)
    torch.save(_random_state(), temporary / f"rng-{me.rank}.pt")
    me.barrier()
    names = me.from_first(
        sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file()) if me.first else None
    )
    mine = {name: _sync_and_hash(temporary / name) for name in names[me.rank :: me.world]}
    files = {name: entry for part in me.gather(mine) for name, entry in part.items()}
    if me.first:
        manifest = {
            "step": engine.steps,
            "skipped": engine.skipped,
            "attempt": attempt,
            "saved": rundir.now(),
            "identity": asdict(identity),
            "files": dict(sorted(files.items())),
        }
        rundir.publish_json(temporary / "manifest.json", manifest)
        os.rename(temporary, final)
        rundir.sync_folder(run.checkpoints)
        for step in steps(run)[keep:]:
            if step != best:
                shutil.rmtree(run.checkpoints / name_of(step))
    me.barrier()
    return final


def resume(run: RunDir, engine: "Engine", me: Processes, identity: Identity) -> tuple[int | None, list[str]]:
    """Load the newest whole checkpoint; all ranks call it. Returns (its step or None, what was skipped and why).

    Raises NoCheckpoint if there are checkpoints and none is whole: a run never starts over in silence.
    Raises ValueError if the newest whole one belongs to other settings, with the first difference.
    """
    chosen, skipped = me.from_first(_choose(run) if me.first else None)
    if chosen is None:
        if skipped:
            raise NoCheckpoint(
                f"{run.checkpoints}: no checkpoint can be resumed: {'; '.join(skipped)}. "
                "Start a new run with another name, or remove the folder to begin anew"
            )
        return None, skipped
    if me.first:
        # Out of the way: the run will come by the same steps again and must save them anew.
        for text in skipped:
            torn = text.partition(":")[0]
            os.rename(run.checkpoints / torn, run.checkpoints / f".torn-{torn}-{time.time_ns()}")
    me.barrier()
    _load(run, engine, me, identity, chosen)
    return chosen, skipped


def load_step(run: RunDir, engine: "Engine", me: Processes, identity: Identity, step: int) -> None:
    """Load the checkpoint of `step`, as of the best one for the export; all ranks call it.

    Raises ValueError, on all ranks, if it is not there, not whole, or of other settings.
    """
    folder = run.checkpoints / name_of(step)
    fault = me.from_first(verify(folder) if me.first else None)
    if fault:
        raise ValueError(f"{folder} cannot be loaded: {fault}")
    _load(run, engine, me, identity, step)


def _load(run: RunDir, engine: "Engine", me: Processes, identity: Identity, step: int) -> None:
    folder = run.checkpoints / name_of(step)
    manifest = rundir.read_json(folder / "manifest.json")
    assert manifest is not None
    difference = identity.first_difference(manifest["identity"])
    if difference:
        raise ValueError(
            f"{folder.name} cannot be continued: {difference}. Use what the run began with, or another run name"
        )
    engine.load(folder, _TAG)
    _set_random_state(torch.load(folder / f"rng-{me.rank}.pt", weights_only=True))
    assert engine.steps == step


def _choose(run: RunDir) -> tuple[int | None, list[str]]:
    skipped: list[str] = []
    for step in steps(run):
        fault = verify(run.checkpoints / name_of(step))
        if fault is None:
            return step, skipped
        skipped.append(f"{name_of(step)}: {fault}")
    return None, skipped


def verify(folder: Path) -> str | None:
    """Why the checkpoint is not whole, or None: every file has the size and SHA-256 of the manifest."""
    try:
        manifest = rundir.read_json(folder / "manifest.json")
    except json.JSONDecodeError:
        return "manifest.json is damaged"
    if manifest is None:
        return "manifest.json is missing"
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if _hash(path) != entry["sha256"]:
            return f"{name} has other content than was saved"
    return None


def _sync_and_hash(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _hash(path)}


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
