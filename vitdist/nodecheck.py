"""What a node must pass before training, in a second: run by the node job as a child, which may hang and be killed.

    python -m vitdist.nodecheck RUN_DIR --gpus 8 --processes 8      # one JSON object on stdout

`look` gathers facts from the machine, `judge` says what of them is a fault; the second is pure. Imports no torch: the
time of its import would be added to every start. Bandwidth between ranks is measured by the trainers, which have it.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vitdist import config, rundir
from vitdist.config import Config, SettingsError
from vitdist.rundir import RunDir

PACKAGES = ("torch", "deepspeed", "transformers", "torchvision", "webdataset", "numpy", "safetensors", "pydantic")
"""What must be the same on all nodes: ranks with different ones train different models, or none."""
ANSWER_S = 20.0
"""For nvidia-smi: on a node whose driver hangs it never answers."""
HELD_MB = 2048
"""Memory of a GPU in use before training: above what a display or a daemon of the site takes, somebody trains there."""
SPACE_MB = 256
FILES_MOST = 1024
SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi."""

    name: str
    memory_mb: int
    used_mb: int
    uncorrected: int | None
    """ECC errors since the driver was loaded that could not be corrected; None where the card does not count."""
    remap_failed: bool = False
    """A row of its memory is broken and could not be replaced."""


@dataclass(frozen=True)
class Node:
    """What was found."""

    host: str
    time: float
    """Unix seconds."""
    gpus: list[Gpu] = field(default_factory=list)
    gpu_fault: str | None = None
    """What kept nvidia-smi from answering."""
    cores: int = 0
    """That this process may use."""
    files: int = 0
    """Open files that a process may have."""
    free_mb: dict[str, int] = field(default_factory=dict)
    """Folder -> room in it."""
    unwritable: dict[str, str] = field(default_factory=dict)
    """Folder -> why nothing can be written there."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Shard -> why it cannot be read."""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Faults end the start and leave the node out; warnings are told."""

    faults: list[str]
    warnings: list[str]


def judge(node: Node, gpus: int, processes: int, workers: int) -> Verdict:
    """`gpus` and `processes`: wanted on the node; `workers`: loader processes of each rank."""
    faults, warnings = [], []
    if gpus:
        if node.gpu_fault:
            faults.append(f"nvidia-smi: {node.gpu_fault}")
        elif len(node.gpus) < gpus:
            faults.append(f"{len(node.gpus)} of {gpus} GPUs")
    for number, gpu in enumerate(node.gpus[:gpus]):
        if gpu.remap_failed:
            faults.append(f"GPU {number}: a broken row of its memory could not be replaced")
        if gpu.uncorrected:
            warnings.append(f"GPU {number}: {gpu.uncorrected} ECC errors that could not be corrected")
        if gpu.used_mb > HELD_MB:
            faults.append(f"GPU {number}: {gpu.used_mb} MB are in use by another process")
    if len({gpu.name for gpu in node.gpus[:gpus]}) > 1:
        faults.append(f"GPUs of different types: {', '.join(sorted({gpu.name for gpu in node.gpus[:gpus]}))}")
    faults += [f"{place}: {why}" for place, why in {**node.unwritable, **node.unreadable}.items()]
    faults += [f"{place}: {room} MB free" for place, room in node.free_mb.items() if room < SPACE_MB]
    if node.cores < processes * max(1, workers):
        warnings.append(f"{node.cores} cores for {processes} ranks with {workers} loader processes each")
    if node.files < FILES_MOST:
        warnings.append(f"a process may open {node.files} files only: raise `ulimit -n` in the cluster's setup lines")
    return Verdict(faults, warnings)


def look(run: RunDir, settings: Config | None, gpus: int) -> Node:
    """Look at this machine. `settings`: None where they cannot be read, which the trainers tell better."""
    found, gpu_fault = _gpus() if gpus else ([], None)
    places = {str(run.path), tempfile.gettempdir(), "/dev/shm"}
    if settings and settings.data.cache:
        places.add(os.path.expandvars(settings.data.cache))
    unwritable, free = {}, {}
    for place in sorted(places):
        why = _unwritable(Path(place)) if "$" not in place else "a variable in it is not set here"
        if why:
            unwritable[place] = why
        else:
            free[place] = shutil.disk_usage(place).free >> 20
    return Node(
        host=socket.gethostname(),
        time=time.time(),
        gpus=found,
        gpu_fault=gpu_fault,
        cores=len(os.sched_getaffinity(0)),
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        free_mb=free,
        unwritable=unwritable,
        unreadable={} if not settings or settings.data.stream else _unreadable(settings),
        versions={"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
    )


_QUERY = "name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"


def _gpus() -> tuple[list[Gpu], str | None]:
    """(GPUs of this node, why they cannot be told)."""
    try:
        listed = _nvidia_smi(f"--query-gpu={_QUERY}")
        failed: list[bool] = []
        with contextlib.suppress(RuntimeError):  # cards before Ampere replace no rows
            failed = ["yes" in line.lower() for line in _nvidia_smi("--query-remapped-rows=remapped_rows.failure")]
    except RuntimeError as error:
        return [], str(error)
    return read_gpus(listed, failed), None


def read_gpus(lines: list[str], failed: list[bool]) -> list[Gpu]:
    """The answer of nvidia-smi to `_QUERY`; `failed`: whether a broken row was not replaced, for each card or []."""
    found = []
    told = [line.split(",") for line in lines]
    # Warnings of the driver stand between the lines.
    for number, parts in enumerate(parts for parts in told if len(parts) == 4):
        name, total, used, errors = (part.strip() for part in parts)
        number_of = [int(m[0]) if (m := re.match(r"\d+", text)) else None for text in (total, used, errors)]
        found.append(
            Gpu(name, number_of[0] or 0, number_of[1] or 0, number_of[2], number < len(failed) and failed[number])
        )
    return found


def _nvidia_smi(question: str) -> list[str]:
    """Its lines. Raises RuntimeError with its own words."""
    # Where SLURM does not hide them, a node shows the cards of other jobs too.
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", question, "--format=csv,noheader,nounits", *(["-i", own] if own else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise RuntimeError("no such command on this node: has it GPUs, and their driver?") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer in {ANSWER_S:.0f} s: its driver hangs") from None
    if done.returncode:
        told = " ".join((done.stderr or done.stdout).split())
        raise RuntimeError(told[:300] or f"exit code {done.returncode}")
    return [line for line in done.stdout.splitlines() if line.strip()]


def _unwritable(place: Path) -> str | None:
    """Why a file cannot be written in `place` and brought to its disk; None if it can. The folder is made."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place, prefix=".check-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def _unreadable(settings: Config) -> dict[str, str]:
    """Shard -> why it cannot be read: the beginning of each set. Those on a server are the trainers' to open."""
    found = {}
    for place in (*settings.data.train_sets, settings.data.val):
        if "://" in place:
            continue
        folder = Path(place)
        try:
            record = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            if record.get("base"):
                continue
            shard = folder / record["shards"][0]["name"]
            with open(shard, "rb") as file:
                if not file.read(SAMPLE_BYTES):
                    found[str(shard)] = "is empty here"
        except (OSError, ValueError, LookupError, TypeError) as error:
            found[place] = f"cannot be read here ({getattr(error, 'strerror', None) or error})"
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    run = RunDir(Path(args.run))
    settings: Config | None = None
    with contextlib.suppress(SettingsError):
        settings = config.load(run.config)
    node = look(run, settings, args.gpus)
    workers = settings.data.workers if settings and isinstance(settings.data.workers, int) else 1
    print(
        json.dumps({"schema": rundir.SCHEMA, **asdict(node), **asdict(judge(node, args.gpus, args.processes, workers))})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
