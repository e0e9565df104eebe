"""Validation pictures beside what the model took them for, out of a run folder and its shards. Imports no torch.

    gallery.mistakes(run, most=16)      # those that the model was surest of
    gallery.spread(run, most=16)        # some of all, evenly over the set

The pictures are read from the shards that the settings name.
"""

import zipfile
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from vitdist import config, rundir
from vitdist.data.index import Index
from vitdist.rundir import RunDir


class Seen(NamedTuple):
    """A validation sample and its prediction."""

    id: int
    """Row of the index."""
    source: str
    """The picture's path when it was packed."""
    label: str
    predicted: str
    confidence: float
    """Probability of the predicted class."""
    stored: bytes
    """The picture's file."""


class Predictions(NamedTuple):
    """predictions.npz, all [samples]."""

    ids: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray


def predictions(run: RunDir) -> Predictions | None:
    """Those of the newest evaluation, None before the first. Raises OSError, and ValueError for a damaged file."""
    if not run.predictions.exists():
        return None
    try:
        with np.load(run.predictions) as kept:
            return Predictions(*(kept[name] for name in Predictions._fields))
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{run.predictions}: is damaged ({error})") from None


def mistakes(run: RunDir, most: int) -> list[Seen]:
    """The `most` mistakes that the model was surest of: look for wrong labels first. Raises as `seen` does."""
    found = predictions(run)
    if found is None:
        return []
    wrong = np.flatnonzero(found.labels != found.predicted)
    return seen(run, found, wrong[np.argsort(-found.confidence[wrong], kind="stable")][:most])


def spread(run: RunDir, most: int) -> list[Seen]:
    """`most` samples, evenly over the set, right or wrong. Raises as `seen` does."""
    found = predictions(run)
    if found is None:
        return []
    return seen(run, found, np.unique(np.linspace(0, len(found.ids) - 1, most).astype(int)))


def seen(run: RunDir, found: Predictions, places: Iterable[int]) -> list[Seen]:
    """The samples at `places` of `found`. Raises OSError and ValueError where the shards are out of reach or others."""
    try:
        shards = Index.open(config.read_yaml(run.config)["data"]["val"], check=False)
    except KeyError as error:
        raise ValueError(f"{run.config} has no data.val") from error
    same(run, "val", shards)
    return [
        Seen(
            int(found.ids[k]),
            shards.source(int(found.ids[k])),
            shards.classes[int(found.labels[k])],
            shards.classes[int(found.predicted[k])],
            float(found.confidence[k]),
            shards.image(int(found.ids[k])),
        )
        for k in places
    ]


def same(run: RunDir, kind: str, shards: Index) -> None:
    """Raises ValueError where `shards` are not those that the run recorded as its "train" or "val" set."""
    recorded = ((rundir.state(run).get("data") or {}).get(kind) or {}).get("digest")
    if recorded and not shards.digest.startswith(recorded):
        raise ValueError(f"{shards.folder} changed since the run: its digest is {shards.digest[:12]}, was {recorded}")
