"""The run folder before a start: settings, code, script and pickles in place, or everything as it was before.

    with made(run, parts): ...submit...                     # taken back if the body fails
    with swept(home, sweep, parts), made(point, ...): ...   # a sweep: one folder around its points'

Pickles lie in a folder that nobody else can write to, since a pickle is code.
"""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.sweep import Sweep, write
from vitdist import config, rundir
from vitdist.config import Config, SettingsError
from vitdist.rundir import RunDir


@dataclass(frozen=True)
class Parts:
    """What a start puts into its run folder."""

    settings: Config
    place: dict[str, Any]
    """For cluster.yaml: scheduler, nodes, processes, the profile, the sweep."""
    script: str
    attempt: int
    argv: Sequence[str]
    """The command, for env.json."""
    checkout: Path
    sweep: RunDir | None
    """The folder of the sweep that this is a point of: it has the code already."""
    new_code: bool
    """Whether the checkout is other than the last start's code, which is then kept beside it."""
    recipe: str = ""
    """The file of settings that a new run begins with, for env.json; one that goes on keeps its own."""


@contextlib.contextmanager
def made(run: RunDir, parts: Parts) -> Iterator[None]:
    """The run folder with everything that a start needs; taken back if the body fails.

    Raises OSError for a full disk, SettingsError for a folder of pickles that is another user's.
    """
    new, new_parent = not run.path.exists(), not run.path.parent.exists()
    before: dict[Path, bytes] = {}
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        if parts.new_code or not run.code.exists():
            _freeze(run, parts)
        private(run.submitit)
        before = {path: path.read_bytes() for path in (run.cluster, run.submit, run.config) if path.exists()}
        rundir.publish(run.cluster, yaml.safe_dump(parts.place, sort_keys=False, allow_unicode=True))
        rundir.publish(run.submit, parts.script)
        rundir.publish(run.config, config.to_yaml(parts.settings))
        run.stop.unlink(missing_ok=True)  # the wish of an earlier job
        yield
    except BaseException:
        if new:
            remove(run.path, new_parent)
        else:
            for path, content in before.items():
                with contextlib.suppress(OSError):  # a full disk, of which the error tells that is raised below
                    rundir.publish(path, content)
            # What is written before there is a job id.
            for left in run.submitit.glob("[!_]" * 32 + ".pkl"):
                if not left.is_symlink():
                    left.unlink(missing_ok=True)
        raise


def remove(folder: Path, and_parent: bool) -> None:
    """Take a folder away, and the one around it if it is new and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    if and_parent:
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


def private(folder: Path) -> None:
    """Make a folder that nobody else can write to: a pickle is code. Raises SettingsError for another user's."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid():
        whose = "is a link" if stat.S_ISLNK(found.st_mode) else "is another user's"
        raise SettingsError(f"{folder} {whose}: what lies there would be run as you; take it away")
    folder.chmod(0o700)


@contextlib.contextmanager
def swept(home: RunDir, sweep: Sweep, parts: Parts) -> Iterator[None]:
    """The folder of a sweep: its record, and the code that all points share; taken back if the body fails."""
    new, new_parent = not home.path.exists(), not home.path.parent.exists()
    try:
        home.path.mkdir(parents=True, exist_ok=True)
        if parts.new_code or not home.code.exists():
            _freeze(home, parts)
        rundir.publish(home.cluster, yaml.safe_dump(parts.place, sort_keys=False, allow_unicode=True))
        rundir.publish(home.submit, parts.script)
        write(home.path, sweep)
        yield
    except BaseException:
        if new:
            remove(home.path, new_parent)
        raise


def _freeze(run: RunDir, parts: Parts) -> None:
    """The code of this start, the last one's kept beside it."""
    from launch import snapshot

    recipe = parts.recipe or str((rundir.read_json(run.env) or {}).get("recipe") or "")
    for path in (run.code, run.patch, run.env):
        kept = path.with_name(f"{path.stem}-before-attempt-{parts.attempt}{path.suffix}")
        if path.is_dir() and kept.exists():  # of a start that was submitted and never began
            shutil.rmtree(path)
        elif path.exists() and not kept.exists():
            path.rename(kept)
    if parts.sweep and parts.sweep != run:
        snapshot.share(parts.sweep, run)
    else:
        snapshot.take(parts.checkout, run, parts.argv, recipe)
