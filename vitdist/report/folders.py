"""Which runs are meant by the folders that someone names: runs, a sweep, a folder of runs.

runs, home = find([Path("runs/lr")])      # the points of a sweep that have begun, and where their comparison lies
"""

import os
from pathlib import Path
from typing import Any

from vitdist import config
from vitdist.rundir import RunDir

SWEEP = "sweep.yaml"
"""In the folder of a sweep, which lies beside those of its points; launch/sweep.py writes it."""


def find(folders: list[Path]) -> tuple[list[RunDir], Path]:
    """Every run that is named, once, in their order; and the folder that they share.

    Raises ValueError for a folder that is none of these.
    """
    found: dict[Path, RunDir] = {}
    for folder in folders:
        for run in _runs(folder):
            found.setdefault(run.path.resolve(), run)
    if len(folders) == 1:
        return list(found.values()), folders[0]
    return list(found.values()), Path(os.path.commonpath([path.parent for path in found]))


def _runs(folder: Path) -> list[RunDir]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no run folder (there is none of this name); run folders lie under runs/")
    if RunDir(folder).config.exists():
        return [RunDir(folder)]
    if points := _points(folder):
        runs = [RunDir(folder.parent / name) for name in points]
        runs = [run for run in runs if run.config.exists()]
    else:
        runs = [RunDir(path) for path in sorted(folder.iterdir()) if RunDir(path).config.exists()]
    if not runs:
        raise ValueError(f"{folder} is no run folder (it has no config.yaml), no sweep and no folder of runs")
    return runs


def _points(home: Path) -> dict[str, list[str]]:
    """Name -> overrides of the points of a sweep; {} where `home` is none. Raises ValueError for a damaged record."""
    if not (home / SWEEP).is_file():
        return {}
    record = config.read_yaml(home / SWEEP)
    try:
        return {str(point["folder"]): list(map(str, point["overrides"])) for point in record["points"]}
    except (KeyError, TypeError):
        raise ValueError(f"{home / SWEEP}: is damaged: put a copy back, or name its runs instead") from None


def overrides(run: RunDir) -> list[str]:
    """What its sweep set for this point of it; [] for a run that is none, or whose sweep is gone."""
    place: dict[str, Any] = config.read_yaml(run.cluster) if run.cluster.exists() else {}
    return _points(run.path.parent / place["sweep"]).get(run.name, []) if place.get("sweep") else []
