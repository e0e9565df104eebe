"""The code that a job runs, uncommitted work included, and where it came from.

    snapshot.take(root, run, argv, recipe)      # -> RUN/code, RUN/patch.diff, RUN/env.json
    snapshot.share(sweep, run)                  # the same again, for a point of a sweep

A job that waits for days runs what was submitted, not what the checkout holds by then. Nothing secret may
land in a run folder: no environment variables, no git remotes, no hidden files, no keys.
"""

import getpass
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitdist import rundir
from vitdist.rundir import RunDir

PARTS = ("launch", "vitdist", "configs", "slurm", "pyproject.toml")
MAX_BYTES = 1_000_000
"""Larger files are data that strayed into the checkout."""
KEYS = (".pem", ".key", ".p12", ".pfx", ".env", ".secret", ".token")
PACKAGES = (
    *("torch", "torchvision", "transformers", "deepspeed", "webdataset", "wandb"),
    *("submitit", "pydantic", "numpy", "pillow"),
)


def take(root: Path, run: RunDir, argv: Sequence[str], recipe: str = "") -> None:
    """Copy the code of the checkout `root` into the run and record its provenance."""
    copy(root, run.code)
    rundir.publish(run.patch, patch(root))
    rundir.publish_json(run.env, provenance(root, argv) | ({"recipe": recipe} if recipe else {}))


def share(home: RunDir, run: RunDir) -> None:
    """The snapshot of `home` in `run` too: the same files under a second name, or copies where there are no links."""
    shutil.copytree(home.code, run.code, copy_function=_link, ignore=shutil.ignore_patterns("__pycache__"))
    for path, there in ((home.patch, run.patch), (home.env, run.env)):
        _link(path, there)


def _link(source: str | Path, place: str | Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # another file system, or one without hard links
        shutil.copy(source, place)


def files(root: Path) -> list[Path]:
    """The files of a snapshot, relative to `root`, sorted: tracked, and untracked ones that git does not ignore."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PARTS)
    if listed:
        paths = {Path(os.fsdecode(name)) for name in listed.split(b"\0") if name}
    else:  # no git, or a copy inside a repository that ignores it
        paths = {found.relative_to(root) for part in PARTS for found in _walk(root / part)}
    return sorted(path for path in paths if _wanted(root, path))


def _walk(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    return [
        Path(folder, name)
        for folder, folders, names in os.walk(place)
        for name in names
        if "__pycache__" not in folder and not name.endswith(".pyc")
    ]


def _wanted(root: Path, path: Path) -> bool:
    real = (root / path).resolve()
    if not real.is_relative_to(root.resolve()) or not real.is_file():
        return False  # a link that leads out, or a file deleted since the last commit
    hidden = any(part.startswith(".") for p in (path, real.relative_to(root.resolve())) for part in p.parts)
    return not hidden and not {path.suffix, real.suffix} & set(KEYS) and real.stat().st_size <= MAX_BYTES


def copy(root: Path, code: Path) -> None:
    """The files of a snapshot under `code`, with their modes; links as what they lead to."""
    for path in files(root):
        (code / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, code / path)


def changed(root: Path, code: Path) -> list[Path]:
    """Files that the checkout and an earlier snapshot of it do not have alike."""
    now, then = set(files(root)), {f.relative_to(code) for part in PARTS for f in _walk(code / part)}
    same = {path for path in now & then if (root / path).read_bytes() == (code / path).read_bytes()}
    return sorted((now | then) - same)


def patch(root: Path) -> str:
    """What the snapshot has that the commit has not, as `git apply` reads it; "" outside of git."""
    if _git(root, "rev-parse", "--verify", "HEAD") is None:
        return ""
    # Deleted files must be in it, hidden ones not, so that pathspecs choose and not `files`.
    hidden = [f":(exclude,glob){pattern}" for pattern in ("**/.*", "**/.*/**", *(f"**/*{suffix}" for suffix in KEYS))]
    parts = [_git(root, "diff", "--no-ext-diff", "--relative", "HEAD", "--", *PARTS, *hidden) or b""]
    untracked = (_git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *PARTS) or b"").split(b"\0")
    for name in sorted(filter(None, untracked)):
        path = os.fsdecode(name)
        if _wanted(root, Path(path)):
            # exit code 1: they differ
            parts.append(_git(root, "diff", "--no-ext-diff", "--no-index", "--", "/dev/null", path, fine=(0, 1)) or b"")
    return b"".join(parts).decode(errors="replace")


def provenance(root: Path, argv: Sequence[str]) -> dict[str, Any]:
    """Versions, commit, place and command of a start."""
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    dirty = _git(root, "status", "--porcelain", "--", *PARTS)
    return {
        "time": rundir.now(),
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": commit.decode().strip() if commit else None,
        "dirty": bool(dirty) if dirty is not None else None,
        "argv": list(argv),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str, fine: tuple[int, ...] = (0,)) -> bytes | None:
    """Output of a git command that only reads; None where there is no git or no repository."""
    # `git status` would otherwise refresh the index of a checkout that others may be working in.
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode in fine else None
