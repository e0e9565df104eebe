"""What is in a checkpoint, and whether it is whole: listing, verifying and pruning need no torch.

checkpoints/latest                        name of the newest one, for people and scripts; a resume looks for itself
            writer.json                   who may publish: the newest attempt
            step-00000120/manifest.json   what is in it; the folder was renamed into place when all was written
                          rank-R.safetensors

for entry in manifest.entries(run): print(entry.step, entry.fault)
"""

import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError

from vitdist import rundir
from vitdist.config import Section
from vitdist.rundir import RunDir

FORMAT = 2
_NAME = "manifest.json"
_STEP = re.compile(r"step-(\d{8,12})")
TEMPORARY = ".tmp-"
# Of published files (rundir.publish) whose writer is the trainer, and of an export.
_LEFT_OVER = (
    *(f"checkpoints/{pattern}" for pattern in (f"{TEMPORARY}*", ".latest.*", ".writer.json.*")),
    *(f".{name}.*" for name in ("config.yaml", "evaluation.json", "evaluations.json", "predictions.npz")),
    *("attempts/*/.train.json.*", ".report.html.*", ".model.tmp", ".model.old"),
)
_CHUNK = 8 << 20


class Damaged(ValueError):
    """The checkpoint cannot be used; the text says why."""


class File(Section):
    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class Group(Section):
    """A parameter group: who belongs to it, and its part of the learning rate."""

    name: str
    lr_scale: float
    weight_decay: float
    parameters: dict[str, list[int]]
    """Shape of each parameter by its name, in order."""


class Identity(Section):
    """What must be the same for a checkpoint to be continued."""

    optimizer: str
    global_batch: int
    model: dict[str, Any]
    """The model's configuration as transformers has it, without classes, paths and versions."""
    classes: list[str]
    data: str
    """Digest of the training shards with their shares."""
    groups: list[Group]
    rest: dict[str, list[int]]
    """Shape of each frozen parameter and buffer by its name."""

    def first_difference(self, saved: "Identity") -> str | None:
        """What is other now than it was when `saved` was written, or None."""
        for name, what in (
            ("optimizer", "optimizer"),
            ("global_batch", "global batch"),
            ("classes", "list of classes"),
            ("data", "digest of the training data (data.train with its shares)"),
        ):
            was, now = getattr(saved, name), getattr(self, name)
            if was != now and name == "classes":
                pairs = enumerate(zip(was, now, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), min(len(was), len(now)))
                old, new = (repr(names[at]) if at < len(names) else "none" for names in (was, now))
                return f"the classes were {len(was)}, now {len(now)}; number {at} was {old}, now {new}"
            if was != now:
                short = 12 if name == "data" else None
                return f"the {what} was {str(was)[:short]}, now {str(now)[:short]}"
        if different := _first_of_groups(saved.groups, self.groups):
            return different
        if different := _first_of_shapes(saved.rest, self.rest):
            return different
        now = json.loads(json.dumps(self.model))
        # Those that both know: another version of transformers may have more.
        other = next((name for name in sorted(saved.model.keys() & now) if saved.model[name] != now[name]), None)
        return other and f"{other} of the model's configuration was {saved.model[other]!r}, now {now[other]!r}"


class Counters(Section):
    """The numbers of the state of training."""

    steps: Annotated[int, Field(ge=0)]
    skipped: Annotated[int, Field(ge=0)]
    optimizer: dict[str, float]
    """What the optimizer counts, as Adam its updates."""
    loss_scaler: dict[str, int | float]


class Manifest(Section):
    """The record in a checkpoint's folder."""

    schema_: Annotated[int, Field(alias="schema")]
    format: int
    step: Annotated[int, Field(ge=0)]
    attempt: int
    saved: str
    """UTC."""
    world: Annotated[int, Field(ge=1)]
    zero: int
    precision: str
    average: bool
    """Whether an average of the weights (optim.ema) is in it."""
    counters: Counters
    position: dict[str, float]
    """epoch and samples: the place in the data."""
    identity: Identity
    settings: dict[str, Any]
    """Every setting that the run had, resolved."""
    settings_digest: str
    wandb: str | None
    """Id of the W&B run."""
    versions: dict[str, str | None]
    files: dict[str, File]
    digest: str
    """Of all the rest: a flipped bit in a number here would be resumed like one in a file."""


class Entry(NamedTuple):
    """A folder of a checkpoint, whole or not."""

    path: Path
    step: int
    manifest: Manifest | None
    fault: str | None
    """Why it cannot be used."""


def digest(value: Any) -> str:
    """16 hexadecimal digits of SHA-256 of what can be written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def own_digest(record: Mapping[str, Any]) -> str:
    """The digest of a manifest's record, by all fields but `digest` and `schema`, which rundir adds."""
    return digest({name: value for name, value in record.items() if name not in ("digest", "schema")})


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def steps(run: RunDir) -> list[int]:
    """Steps of the checkpoints that were published, newest first."""
    if not run.checkpoints.is_dir():
        return []
    found = (_STEP.fullmatch(path.name) for path in run.checkpoints.iterdir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def refuse_if_gone(run: RunDir, attempt: int) -> None:
    """Where there is no checkpoint: raises ValueError if a start before `attempt` has left one. A purge of the scratch
    file system, or half a copy of the folder, is not to train from scratch unasked."""
    for earlier in reversed(run.attempts()):
        if earlier.number >= attempt:
            continue
        try:
            record = rundir.read_json(earlier.train) or {}
        except (OSError, ValueError):  # a damaged record says nothing
            continue
        left = record.get("goes_on_from") or (record.get("step") if record.get("saved") else 0)
        if isinstance(left, int) and left > 0:
            raise ValueError(
                f"{run.checkpoints} holds no checkpoint, but start {earlier.number} has left one of step {left}: bring "
                "the folder back, or begin anew under another name"
            )


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises Damaged."""
    try:
        if not folder.is_dir():
            raise Damaged("it is not there")
        if (folder / _NAME).exists() and not (folder / _NAME).is_file():
            raise Damaged(f"{_NAME} is no file")
    except OSError as error:  # is_dir and its like pass on what shared storage says in a bad moment
        raise Damaged(f"it cannot be read ({error.strerror})") from None
    try:
        record = rundir.read_json(folder / _NAME)
    except (ValueError, OSError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"{_NAME} cannot be read ({str(error).splitlines()[0]})") from None
    if record is None:
        raise Damaged(f"{_NAME} is missing")
    if record.get("format") != FORMAT:
        raise Damaged(f"{_NAME} is of another version of vitdist (format {record.get('format', 1)}, not {FORMAT})")
    if record.get("digest") != own_digest(record):
        raise Damaged(f"{_NAME} has other content than was saved")
    try:
        manifest = Manifest.model_validate(record, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(f"{_NAME} is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']})") from None
    if len(manifest.files) != manifest.world:  # before a set of a stranger's billion names is made
        raise Damaged(f"{_NAME} is damaged (files: {len(manifest.files):,} for {manifest.world:,} ranks)")
    # A name out of the folder would make a stranger's manifest read any file.
    wanted = {file_of(rank) for rank in range(manifest.world)}
    if set(manifest.files) != wanted:
        odd = sorted(set(manifest.files) ^ wanted)[0]
        raise Damaged(f"{_NAME} is damaged (files: {odd!r} is not among those of {manifest.world} ranks, or missing)")
    if name_of(manifest.step) != folder.name or manifest.counters.steps != manifest.step:
        raise Damaged(f"{_NAME} is of step {manifest.step}: its folder must be called {name_of(manifest.step)}")
    return manifest


def file_of(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def fault(folder: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """What is wrong with the files `names`, or None: each has the size and SHA-256 of the manifest."""
    for name in names:
        path, told = folder / name, manifest.files[name]
        try:
            if reason := _size_fault(path, told):
                return reason
            if sha256(path) != told.sha256:
                return f"{name} has other content than was saved"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def verify(folder: Path) -> str | None:
    """Why the checkpoint cannot be used, or None if it is whole; reads all of it."""
    try:
        manifest = read(folder)
    except Damaged as error:
        return str(error)
    return fault(folder, manifest, manifest.files)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entries(run: RunDir, thorough: bool) -> Iterator[Entry]:
    """Every checkpoint, newest first; only a `thorough` look reads the files and not just their sizes."""
    for step in steps(run):
        folder = run.checkpoints / name_of(step)
        try:
            manifest = read(folder)
        except Damaged as error:
            yield Entry(folder, step, None, str(error))
            continue
        if thorough:
            reason = fault(folder, manifest, manifest.files)
        else:
            reason = next(filter(None, (_size_fault(folder / n, file) for n, file in manifest.files.items())), None)
        yield Entry(folder, step, manifest, reason)


def line(entry: Entry, best: bool, verified: bool) -> str:
    """What a person wants to know of a checkpoint."""
    if entry.manifest is None:
        return f"{entry.path.name}  DAMAGED: {entry.fault}"
    saved, size = entry.manifest, sum(file.bytes for file in entry.manifest.files.values())
    state = f"DAMAGED: {entry.fault}" if entry.fault else "whole" if verified else "sizes right"
    return (
        f"{entry.path.name}  {saved.saved[:19].replace('T', ' ')}  attempt {saved.attempt}  "
        f"{saved.world} rank{'s' if saved.world > 1 else ''} ZeRO-{saved.zero} {saved.precision}  "
        f"{size / 1e6:,.1f} MB  epoch {saved.position.get('epoch', 0.0):.2f}  {state}{'  best' if best else ''}"
    )


def left_over(run: RunDir) -> list[Path]:
    """What a killed writer left behind; only for who holds the lock of the run, since one that lives looks the same."""
    return sorted(path for pattern in _LEFT_OVER for path in run.path.glob(pattern))


def clean(run: RunDir) -> None:
    """Remove what killed writers left behind. For who holds the lock of the run."""
    for path in left_over(run):
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:  # as NFS does with files that are still open: it costs room, no more
            print(f"{path} was left by a killed writer and cannot be removed: {error.strerror}", file=sys.stderr)


def remove(folder: Path) -> None:
    """Take a checkpoint away: out of its name first, so that a kill leaves no half of one."""
    aside = folder.with_name(f"{TEMPORARY}old-{folder.name}-{os.urandom(4).hex()}")
    os.rename(folder, aside)
    shutil.rmtree(aside)


def superfluous(whole: list[int], damaged: list[int], keep: int, best: int | None) -> list[int]:
    """Steps to remove: all but the newest `keep` whole ones and the best; damaged ones older than the newest whole.

    Pure. A damaged one never counts among those kept.
    """
    newest = max(whole, default=-1)
    old = [step for step in sorted(whole, reverse=True)[keep:] if step != best]
    return sorted(old + [step for step in damaged if step < newest])


def _size_fault(path: Path, told: File) -> str | None:
    try:
        status = path.stat()
    except OSError as error:
        gone = isinstance(error, FileNotFoundError)
        return f"{path.name} is missing" if gone else f"{path.name} cannot be read ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):  # a pipe, or a link to a device, would be read for ever
        return f"{path.name} is no file"
    if status.st_size != told.bytes:
        return f"{path.name} has {status.st_size:,} bytes instead of {told.bytes:,}"
    return None


def _first_of_groups(was: list[Group], now: list[Group]) -> str | None:
    # Members alone: scale and decay of a group are settings, of which the new ones count (changes.py).
    shapes_were = {name: shape for group in was for name, shape in group.parameters.items()}
    shapes_are = {name: shape for group in now for name, shape in group.parameters.items()}
    if different := _first_of_shapes(shapes_were, shapes_are):
        return different
    group_was = {name: group.name for group in was for name in group.parameters}
    group_is = {name: group.name for group in now for name in group.parameters}
    for name, old in group_was.items():
        if group_is[name] != old:
            return f"{name} was in the parameter group {old}, now in {group_is[name]}"
    return None


def _first_of_shapes(was: dict[str, list[int]], now: dict[str, list[int]]) -> str | None:
    for name, shape in was.items():
        if name not in now:
            return f"{name} was a trained parameter, and is none now"
        if now[name] != shape:
            return f"{name} had the shape {shape}, now {now[name]}"
    new = [name for name in now if name not in was]
    return f"{new[0]} is new" if new else None
