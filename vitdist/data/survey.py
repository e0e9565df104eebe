"""Splits of a data set, looked at picture by picture: what `vitdist stats` tells, draws and writes. No torch.

    found = survey.measure(["shards/train", "shards/val"])
    survey.sentences(found)                  # what one should know before a training, the gravest first
    survey.record(found)                     # everything, for machines

Every picture is read once, JPEGs decoded as small as their decoder can make them (at most 1/8).
"""

import contextlib
import hashlib
import io
import itertools
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from vitdist.data import duplicates, parallel
from vitdist.data.duplicates import SIDE
from vitdist.data.index import Index
from vitdist.data.recode import ORIENTATION, SIDEWAYS, UPRIGHT

SAMPLES = 2000
"""Pictures that mean and standard deviation are measured on: over these, 1/255 or better."""
_SPLITS = ("train", "val", "valid", "validation", "test")
_ROWS = 500  # of one task: small enough for a bar that moves
_COLOUR_SIDE = 256  # mean and deviation are measured at: what a network sees, and not the noise of 12 megapixels
_LEVELS = np.arange(256) / 255


Record = dict[str, Any]


class Look(NamedTuple):
    """What is kept of each picture of a split; all arrays [samples]."""

    width: np.ndarray
    height: np.ndarray
    form: np.ndarray
    """As PIL calls it, such as JPEG; empty text for a picture that is broken."""
    digest: np.ndarray
    """16 bytes of BLAKE2 of the file."""
    thumbnail: np.ndarray
    """uint8 [samples, SIDE, SIDE], grey."""
    colours: np.ndarray
    """float64 [samples, 2, 3]: mean of each channel and of its square, 0 to 1; NaN where not measured."""


@dataclass(frozen=True)
class Pair:
    """Two pictures of the same thing, by their rows in all splits together."""

    first: int
    second: int
    exact: bool
    likeness: float


@dataclass(frozen=True)
class Stats:
    """Splits of one data set, looked at."""

    splits: dict[str, Index]
    look: Look
    """Of all splits, one after the other."""
    classes: list[str]
    counts: np.ndarray
    """int64 [splits, classes]"""
    labels: np.ndarray
    """int64 [samples], numbers of `classes`"""
    starts: np.ndarray
    """int64 [splits + 1], first row of each split"""
    groups: list[str] | None
    pairs: list[Pair]

    def split_of(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, "right")) - 1

    def place(self, row: int) -> tuple[Index, int]:
        """Index and row in it."""
        split = self.split_of(row)
        return list(self.splits.values())[split], row - int(self.starts[split])


# ---- looking ----------------------------------------------------------------------------------------


def find_splits(folders: Sequence[str | Path]) -> dict[str, Index]:
    """Name -> index of each folder, or of those that lie in a single one. Raises ValueError."""
    if len(folders) == 1 and not (Path(folders[0]) / "index.json").exists():
        inside = [Path(folders[0], name) for name in _SPLITS]
        folders = [folder for folder in inside if (folder / "index.json").exists()] or folders
    sets = [Index.open(folder) for folder in folders]
    short = [Path(part.folder).name or part.folder for part in sets]
    names = short if len(set(short)) == len(short) else [part.folder for part in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"{max(names, key=names.count)} is given twice")
    return dict(zip(names, sets, strict=True))


_splits: list[Index]
"""What the processes of the pool look at: set before they are forked, for to pickle it costs its size."""


def measure(
    folders: Sequence[str | Path],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Stats:
    """Look at every picture. Raises ValueError for what is no indexed set."""
    global _splits
    if samples < 1:
        raise ValueError(f"--samples {samples}: at least 1")
    splits = find_splits(folders)
    _splits = list(splits.values())
    starts = np.concatenate([[0], np.cumsum([len(part) for part in _splits])])
    drawn = np.zeros(int(starts[-1]), bool)
    drawn[np.argsort(np.random.Philox(key=seed).random_raw(len(drawn)), kind="stable")[:samples]] = True
    tasks = [
        (k, first, drawn[starts[k] + first : starts[k] + min(first + _ROWS, len(part))])
        for k, part in enumerate(_splits)
        for first in range(0, len(part), _ROWS)
    ]
    looks = parallel.each(
        _look, tasks, "looking", unit="pictures", total=len(drawn), workers=workers, progress=progress
    )
    look = Look(*(np.concatenate(parts) for parts in zip(*looks, strict=True)))
    classes, labels = _united([(part.classes, part.labels) for part in _splits])
    counts = [np.bincount(labels[a:b], minlength=len(classes)) for a, b in itertools.pairwise(starts)]
    groups = [group for part in _splits for group in part.groups() or [""] * len(part)]
    return Stats(
        splits, look, classes, np.stack(counts), labels, starts, groups if any(groups) else None, find_pairs(look)
    )


def _united(parts: Sequence[tuple[list[str], np.ndarray]]) -> tuple[list[str], np.ndarray]:
    """Class names of all splits, in the order of the first, and the labels of all by these."""
    classes = list(dict.fromkeys(name for names, _ in parts for name in names))
    number = {name: k for k, name in enumerate(classes)}
    return classes, np.concatenate([np.array([number[n] for n in names])[labels] for names, labels in parts])


def _look(task: tuple[int, int, np.ndarray]) -> Look:
    split, first, drawn = task
    looks = []
    for row, coloured in enumerate(drawn.tolist(), first):
        looks.append(_look_at(_splits[split], row, coloured))
        parallel.advance()
    return Look(*(np.array(values) for values in zip(*looks, strict=True)))


def _look_at(source: Index, row: int, coloured: bool) -> tuple[Any, ...]:
    """A row of `Look`."""
    try:
        picture = source.image(row)
        image = opened(picture, _COLOUR_SIDE if coloured else 2 * SIDE)
    except Exception:  # decoders raise what they like; `vitdist verify` says what
        return 0, 0, "", np.zeros(16, np.uint8), np.zeros((SIDE, SIDE), np.uint8), np.full((2, 3), np.nan)
    colours = np.full((2, 3), np.nan)
    if coloured:
        # By the histogram: 0.1 ms, where the mean of an array of floats takes 4.
        shares = np.array(image.pixels.histogram()).reshape(3, 256) / (image.pixels.width * image.pixels.height)
        colours = np.stack([shares @ _LEVELS, shares @ _LEVELS**2])
    grey = image.pixels.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    digest = np.frombuffer(hashlib.blake2b(picture, digest_size=16).digest(), np.uint8)
    return image.width, image.height, image.form, digest, np.asarray(grey), colours


class Opened(NamedTuple):
    pixels: Image.Image
    """Upright; of a JPEG no smaller than asked for, but perhaps smaller than it is."""
    width: int
    height: int
    form: str


def opened(picture: bytes, side: int) -> Opened:
    """Decode a picture, a JPEG at 1/2, 1/4 or 1/8 where both its sides keep `side` pixels. Raises as PIL does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # palettes with transparency, large pictures: `vitdist verify` tells
        file = Image.open(io.BytesIO(picture))
        width, height = file.size
        turn = UPRIGHT.get(file.getexif().get(ORIENTATION, 1))
        pixels = file
        if file.format == "JPEG" and file.mode in ("L", "RGB"):
            with contextlib.suppress(ValueError):  # PIL reads what libjpeg only warns of
                pixels = Image.fromarray(simplejpeg.decode_jpeg(picture, "RGB", min_height=side, min_width=side))
        if pixels.mode.startswith("I"):  # 16-bit grey: PIL clips at 255
            pixels = Image.fromarray((np.asarray(pixels) >> 8).astype(np.uint8))
        pixels = pixels.convert("RGBA").convert("RGB") if pixels.mode == "P" else pixels.convert("RGB")
        if turn is not None:
            pixels = pixels.transpose(turn)
            if turn in map(UPRIGHT.get, SIDEWAYS):
                width, height = height, width
        return Opened(pixels, width, height, file.format or "")


# ---- telling ----------------------------------------------------------------------------------------


def find_pairs(look: Look) -> list[Pair]:
    """Same files, each with the first of them; then near duplicates among these first ones."""
    good = np.flatnonzero(look.form != "")
    if not len(good):
        return []
    digests = np.ascontiguousarray(look.digest[good]).view("V16").reshape(-1)
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    owner = first[inverse]
    copies = np.flatnonzero(owner != np.arange(len(good)))
    pairs = [Pair(int(good[owner[k]]), int(good[k]), True, 1.0) for k in copies]
    rest = good[np.sort(first)]
    # A picture of a few pixels or of one colour has no details to be told by.
    flat = look.thumbnail[rest].reshape(len(rest), -1).std(1) < duplicates.FLAT
    rest = rest[~flat & (np.minimum(look.width, look.height)[rest] >= SIDE)]
    found = duplicates.near(duplicates.phash(look.thumbnail[rest]), look.thumbnail[rest])
    near = zip(*(part.tolist() for part in found), strict=True)
    return pairs + [Pair(int(rest[a]), int(rest[b]), False, round(alike, 4)) for a, b, _, alike in near]


def kind(stats: Stats, pair: Pair) -> str:
    """What a pair means: the gravest first."""
    if stats.labels[pair.first] != stats.labels[pair.second]:
        return "labels differ"
    return "across splits" if stats.split_of(pair.first) != stats.split_of(pair.second) else "within a split"


def crossing_groups(stats: Stats) -> list[tuple[str, list[int]]]:
    """Groups in more than one split, with their samples in each, the largest first."""
    sizes: dict[str, list[int]] = defaultdict(lambda: [0] * len(stats.splits))
    for row, group in enumerate(stats.groups or ()):
        if group:
            sizes[group][stats.split_of(row)] += 1
    found = [(group, counts) for group, counts in sizes.items() if sum(map(bool, counts)) > 1]
    return sorted(found, key=lambda item: (-sum(item[1]), item[0]))


def colours(look: Look) -> tuple[list[float], list[float], int]:
    """Mean and standard deviation of R, G, B on the scale 0 to 1, each picture weighing the same, and of how many."""
    known = look.colours[~np.isnan(look.colours[:, 0, 0])]
    if not len(known):
        return [], [], 0
    mean, square = known.mean(0)
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    return mean.round(4).tolist(), deviation.round(4).tolist(), len(known)


def imbalance(counts: np.ndarray) -> float | None:
    """Largest class by smallest, None if one is empty."""
    return float(counts.max() / counts.min()) if counts.min() else None


def _spread(values: np.ndarray) -> Record:
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}


def record(stats: Stats, pairs: bool = True) -> Record:
    """Everything, for machines; `pairs` too, whose paths are read from the shards."""
    mean, deviation, measured = colours(stats.look)
    good = stats.look.form != ""
    sizes = np.concatenate([part.columns["image_size"] for part in stats.splits.values()])
    total = stats.counts.sum(0)
    return {
        "splits": {name: part.summary() for name, part in stats.splits.items()},
        "classes": [
            {"name": name, "share": round(float(total[k] / total.sum()), 6)}
            | {split: int(n) for split, n in zip(stats.splits, stats.counts[:, k], strict=True)}
            for k, name in enumerate(stats.classes)
        ],
        "imbalance": {name: imbalance(row) for name, row in zip(stats.splits, stats.counts, strict=True)},
        "width": _spread(stats.look.width[good]) if good.any() else None,
        "height": _spread(stats.look.height[good]) if good.any() else None,
        "bytes": _spread(sizes),
        "formats": dict(Counter(stats.look.form[good].tolist()).most_common()),
        "mean": mean,
        "std": deviation,
        "colours_measured_on": measured,
        "pairs": [pair_record(stats, pair) for pair in ranked(stats) if pairs],
        "groups_across_splits": [
            {"group": group, **dict(zip(stats.splits, counts, strict=True))} for group, counts in crossing_groups(stats)
        ],
        "broken": [sample_record(stats, row) for row in np.flatnonzero(~good).tolist()],
    }


def ranked(stats: Stats) -> list[Pair]:
    """Pairs, the gravest first: labels that differ, then across splits; of these the most alike."""
    order = {"labels differ": 0, "across splits": 1, "within a split": 2}
    return sorted(stats.pairs, key=lambda p: (order[kind(stats, p)], -p.likeness, p.first, p.second))


def sample_record(stats: Stats, row: int) -> Record:
    source, inside = stats.place(row)
    known: Record = {
        "split": list(stats.splits)[stats.split_of(row)],
        "row": inside,
        "key": source.key(inside),
        "class": stats.classes[stats.labels[row]],
    }
    with contextlib.suppress(OSError, ValueError):  # of a broken sample its key has to do
        known["path"] = source.source(inside)
    return known | ({"group": stats.groups[row]} if stats.groups else {})


def pair_record(stats: Stats, pair: Pair) -> Record:
    return {
        "kind": kind(stats, pair),
        "same_file": pair.exact,
        "likeness": pair.likeness,
        "first": sample_record(stats, pair.first),
        "second": sample_record(stats, pair.second),
    }


def sentences(stats: Stats) -> list[str]:
    """What one should know before a training, the gravest first; empty if nothing is wrong."""
    kinds = defaultdict(list)
    for pair in stats.pairs:
        kinds[kind(stats, pair)].append(pair)
    names = list(stats.splits)
    said = []
    if found := kinds["labels differ"]:
        said.append(f"{_pairs(found)} with different labels: one of the two is wrong")
    leaks = Counter(
        (names[stats.split_of(first)], names[stats.split_of(second)])
        for first, second in {
            (stats.starts[stats.split_of(p.first)], p.second)
            for p in stats.pairs
            if stats.split_of(p.first) != stats.split_of(p.second)
        }
    )
    for (first_split, second_split), count in leaks.items():
        share = count / len(stats.splits[second_split])
        said.append(f"{count:,} of {second_split} ({100 * share:.1f} %) are in {first_split} too: they measure memory")
    if crossing := crossing_groups(stats):
        said.append(f"{_number(len(crossing), 'group')} on both sides of a split: what is measured there is too good")
    if found := kinds["within a split"]:
        said.append(f"{_pairs(found)} within one split and class: they weigh twice")
    for name, row in zip(names, stats.counts, strict=True):
        if missing := [c for c, n in zip(stats.classes, row.tolist(), strict=True) if not n]:
            said.append(f"{name} has no sample of {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    if broken := int((stats.look.form == "").sum()):
        said.append(f"{_number(broken, 'broken sample')}: run vitdist verify")
    return said


def _pairs(pairs: Sequence[Pair]) -> str:
    exact = sum(pair.exact for pair in pairs)
    parts = [f"{exact:,} of the same file"] * bool(exact) + [f"{len(pairs) - exact:,} nearly alike"] * (
        exact < len(pairs)
    )
    return f"{_number(len(pairs), 'pair')} of pictures ({', '.join(parts)})"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def facts(stats: Stats) -> list[tuple[str, str]]:
    """Name and value of what is known of the pictures."""
    rows = _sizes(stats)
    mean, deviation, measured = colours(stats.look)
    if measured:
        on = f"(R, G, B on 0 to 1, measured on {measured:,} pictures)"
        rows.append(("mean", f"{', '.join(f'{v:.3f}' for v in mean)}  {on}"))
        rows.append(("std", ", ".join(f"{v:.3f}" for v in deviation)))
    for name, counts in zip(stats.splits, stats.counts, strict=True):
        ratio = imbalance(counts)
        rows.append((name, f"largest class {ratio:,.1f} times the smallest" if ratio else "a class is empty"))
    return rows


def _sizes(stats: Stats) -> list[tuple[str, str]]:
    good = stats.look.form != ""
    if not good.any():
        return []
    sizes = np.concatenate([part.columns["image_size"] for part in stats.splits.values()])

    def spread(values: np.ndarray, unit: str) -> str:
        found = _spread(values)
        if found["min"] == found["max"]:
            return f"{found['min']:,} {unit}"
        return f"{found['min']:,} to {found['max']:,} {unit}, median {found['median']:,}"

    forms = Counter(stats.look.form[good].tolist()).most_common()
    return [
        ("width", spread(stats.look.width[good], "pixels")),
        ("height", spread(stats.look.height[good], "pixels")),
        ("file", spread(sizes, "bytes")),
        ("formats", ", ".join(f"{form} {n:,}" for form, n in forms)),
    ]
