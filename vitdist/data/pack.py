"""Pictures -> indexed WebDataset tar shards, with the original bytes or made small.

    vitdist pack PICTURES OUT                       PICTURES/CLASS/**.jpg               -> OUT/train
    vitdist pack PICTURES OUT --val-fraction 0.1    the same, a tenth of each class     -> OUT/val
    vitdist pack PICTURES OUT                       PICTURES/train/CLASS, .../val/CLASS -> OUT/train, OUT/val
    vitdist pack TABLE.csv OUT --group-by patient --val-fraction 0.1    patients do not cross into validation
    vitdist pack SRC OUT --resize 256 --quality 95                      JPEGs of 256 pixels on the short side

What can be packed stands in `sources.py`, what --resize does in `recode.py`. The bytes of the shards depend on
the names and contents of the pictures and on the arguments only, not on who packs, when, or in how many
processes. A shard appears whole or not at all; packing again goes on where it was interrupted.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from vitdist import rundir
from vitdist.data import index, made, parallel, sources, split
from vitdist.data.files import Picture
from vitdist.data.index import GROUP, LABEL, SOURCE, Index, Scan
from vitdist.data.recode import Recipe, recode
from vitdist.data.sources import DataSet, Options, Part

# A tar is cut into blocks, and ends on a multiple of 20 of them.
_BLOCK, _RECORD = 512, 20 * 512
_PLAN, _LOCK, _MADE = ".pack.json", ".pack.lock", ".made-"
# Raised when the same pictures and arguments give other shards, so that half of a pack is not mixed with them.
_FORMAT = 2
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class _Plan(NamedTuple):
    """One split."""

    folder: Path
    root: Path
    pictures: list[Picture]
    """In the order of the shards."""
    identity: str


class _Work(NamedTuple):
    recipe: Recipe
    made: Path
    """Folder for pictures that are made before the shards are cut."""
    shard_bytes: int
    shard_samples: int | None
    workers: int | None
    progress: bool


def pack(
    source: str | Path,
    out: str | Path,
    *,
    val_fraction: float = 0,
    group_by: str | None = None,
    resize: int | None = None,
    quality: int | None = None,
    root: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    classes: str | Path | None = None,
    shard_bytes: int = 256 << 20,
    shard_samples: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Write OUT/train and, where there is one, OUT/val and OUT/test, for `Index.open`; say so on stdout.

    `resize` and `quality` as `Recipe`, `root` to `classes` and `group_by` as `sources.Options`. A shard is
    closed before it exceeds `shard_bytes` or `shard_samples`. Raises ValueError in one line for what is no
    data set, files that are no pictures, an OUT that holds something else, and a disk that is full.
    """
    source, out = Path(source), Path(out)
    recipe = Recipe(resize, quality)
    _check_arguments(source, out, val_fraction, recipe)
    with _listing(progress) as show:
        options = Options(root, image_column, label_column, split_column, classes, group_by)
        data = sources.read(source, options, show)
    parts = _with_validation(source, data, val_fraction)
    arguments = [*recipe, shard_bytes, shard_samples]
    plans = [_plan(out / name, part, data, arguments) for name, part in parts.items()]
    with _told(out), _only_packer(out):
        waiting = [plan for plan in plans if not _is_packed(plan)]
        identity = hashlib.sha256("".join(plan.identity for plan in waiting).encode()).hexdigest()
        work = _Work(recipe, out / f"{_MADE}{identity[:12]}", shard_bytes, shard_samples, workers, progress)
        try:
            _write(waiting, data, work)
        except made.NotPictures as error:
            # Mending them changes the plan, so nothing that was written can be of use.
            _discard(waiting, work.made)
            raise ValueError(str(error)) from None
        for plan in plans:
            _say(plan.folder, "packed" if plan in waiting else "already packed:")
        for left in out.glob(f"{_MADE}*"):
            shutil.rmtree(left)
    for note in data.notes:
        print(note)
    if "val" not in parts:
        print("no validation set, and a run needs one: pack into another folder with --val-fraction 0.1")


def _check_arguments(source: Path, out: Path, val_fraction: float, recipe: Recipe) -> None:
    if not 0 <= val_fraction < 1:
        raise ValueError(f"--val-fraction must be at least 0 and below 1, not {val_fraction}")
    if recipe.resize is not None and recipe.resize < 1:
        raise ValueError(f"--resize must be at least 1 pixel, not {recipe.resize}")
    if recipe.quality is not None and not 1 <= recipe.quality <= 100:
        raise ValueError(f"--quality must be 1 to 100, not {recipe.quality}")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} lies in {source}: pack into a folder beside it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder to pack into")


def _say(folder: Path, verb: str) -> None:
    packed = Index.open(folder)
    size = sum(shard.bytes for shard in packed.shards) / 1e6
    shards = f"{len(packed.shards):,} shard{'s' * (len(packed.shards) > 1)}"
    print(
        f"{verb} {len(packed):,} pictures of {len(packed.classes):,} classes in {folder} "
        f"({shards}, {size:,.1f} MB, digest {packed.digest[:12]})"
    )


@contextlib.contextmanager
def _listing(wanted: bool) -> Iterator[Callable[[int], None]]:
    """A function that shows how many pictures were found, on a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not (wanted and console.is_terminal):
        yield lambda found: None
        return
    with console.status("listing pictures") as status:
        yield lambda found: status.update(f"listing pictures: {found:,}")


# ---- splits and plans -----------------------------------------------------------------------------


def _with_validation(source: Path, data: DataSet, val_fraction: float) -> dict[str, Part]:
    """The parts to pack: the given ones, or with a share of training held out. Says how that came out."""
    parts = dict(data.parts)
    if val_fraction and "val" in parts:
        anew = ", or split anew with --split-column none" if parts["val"].by_column else ""
        raise ValueError(f"{source} has {parts['val'].name} already: leave out --val-fraction{anew}")
    train = parts["train"]
    if val_fraction:
        pictures, held = split.hold_out(train.pictures, val_fraction, data.grouped)
        _say_split(data, pictures, held, val_fraction)
        parts = {
            "train": Part(train.root, pictures, train.name),
            "val": Part(train.root, held, "val"),
            **{name: part for name, part in parts.items() if name == "test"},
        }
    elif "test" in parts and "val" not in parts:
        parts["val"] = parts.pop("test")
        data.notes.append(f"{parts['val'].name} is packed as val: with --val-fraction 0.1 it would stay for the end")
    return parts


def _say_split(data: DataSet, train: Sequence[Picture], val: Sequence[Picture], fraction: float) -> None:
    if data.grouped:
        groups = len({picture.group for picture in train}), len({picture.group for picture in val})
        print(f"{sum(groups):,} groups: {groups[0]:,} for training, {groups[1]:,} for validation")
    counts, held = Counter(p.label for p in (*train, *val)), Counter(p.label for p in val)
    off = {k: held[k] / counts[k] for k in sorted(counts) if abs(held[k] / counts[k] - fraction) > fraction / 4}
    if off:
        named = ", ".join(f"{data.classes[k]} {held[k]} of {counts[k]}" for k in list(off)[:5])
        more = f" and {len(off) - 5:,} more" if len(off) > 5 else ""
        print(
            f"validation share not near {fraction:g}, for want of {'groups' if data.grouped else 'pictures'} "
            f"to choose from: {named}{more}"
        )


def _plan(folder: Path, part: Part, data: DataSet, arguments: list[int | None]) -> _Plan:
    pictures = split.shuffled(part.pictures)
    stores = [[store.path.name, store.path.stat().st_size, data.column] for store in data.stores]
    identity = hashlib.sha256(json.dumps([_FORMAT, data.classes, data.grouped, stores, arguments]).encode())
    for p in pictures:
        identity.update(json.dumps([p.source.hex(), p.label, p.bytes, p.changed, p.group]).encode())
    return _Plan(folder, part.root, pictures, identity.hexdigest())


def _is_packed(plan: _Plan) -> bool:
    """Whether its folder holds this very data set. Raises ValueError if something else is there."""
    folder = plan.folder
    # A pack that is killed as it publishes the plan leaves that under a temporary name.
    if folder.is_dir() and any(not path.name.startswith(f".{_PLAN}.") for path in folder.iterdir()):
        record = rundir.read_json(folder / _PLAN)
        if record is None or record["plan"] != plan.identity:
            what = "other files" if record is None else "other files (of other pictures or arguments)"
            raise ValueError(f"{folder} holds {what}: pack into another folder, or remove it first")
        if (folder / "index.json").exists():
            Index.open(folder)
            return True
    return False


def _begin(plan: _Plan) -> None:
    for path in plan.folder.glob(".shard-*"):
        path.unlink()  # left by a pack that was killed
    rundir.publish_json(plan.folder / _PLAN, {"plan": plan.identity})


def _discard(plans: Sequence[_Plan], made: Path) -> None:
    for plan in plans:
        for path in (*plan.folder.glob("shard-*.tar"), plan.folder / _PLAN):
            path.unlink(missing_ok=True)
    shutil.rmtree(made, ignore_errors=True)


# ---- a disk that is shared and full ---------------------------------------------------------------


@contextlib.contextmanager
def _only_packer(out: Path) -> Iterator[None]:
    """Hold OUT while this process packs. Raises ValueError if another one does.

    A POSIX lock: unlike one of `flock` it is not inherited, so it ends with this process, not with the last of
    its workers. Leaves no folder behind that it made if nothing was written.
    """
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with open(out / _LOCK, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"another pack writes to {out}: wait for it, or pack into another folder") from None
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
        try:
            yield
        except BaseException:
            for folder in (out / name for name in ("train", "val", "test")):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            if [path.name for path in out.iterdir()] == [_LOCK]:
                (out / _LOCK).unlink()
                if new:
                    out.rmdir()
            raise


@contextlib.contextmanager
def _told(out: Path) -> Iterator[None]:
    """Turns a full disk and a killed process into one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        quota = " (or of your quota)" if error.errno == errno.EDQUOT else ""
        raise ValueError(
            f"no space left{quota} for {error.filename or out} ({_free(out) / 1e6:,.0f} MB are free without it): "
            "make room, then the same command goes on where it stopped"
        ) from None
    except BrokenProcessPool:
        raise ValueError(
            "a packing process was killed, most often for want of memory: the same command with fewer --workers goes on"
        ) from None


def _free(out: Path) -> int:
    while not out.exists():
        out = out.parent
    return shutil.disk_usage(out).free


def _check_space(out: Path, needed: int) -> None:
    free = _free(out)
    if needed > free:
        raise ValueError(
            f"{out}: {needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free: make room, or pack elsewhere"
        )


# ---- shards ---------------------------------------------------------------------------------------


class _Shard(NamedTuple):
    path: Path
    first: int
    """Number of the first sample in its split. Keys are numbers: names may hold any script and dots."""
    root: Path
    made: Path
    grouped: bool
    pictures: list[Picture]


def _write(plans: Sequence[_Plan], data: DataSet, work: _Work) -> None:
    """Make, write, scan and index. Raises made.NotPictures, naming them."""
    if not plans:
        return
    source = made.Source(work.recipe, data.stores, data.column)
    _check_space(work.made.parent, _least_bytes(plans, data, work))
    for plan in plans:
        _begin(plan)
    parts, paged = made.make(
        work.made, source, [(plan.root, plan.pictures) for plan in plans], work.workers, work.progress
    )
    if paged:
        print(f"{paged:,} TIFF files have several pages: the first was taken")
    if not work.recipe.keeps_bytes:
        _say_growth([plan.pictures for plan in plans], parts)
    cut = [list(_cut(plan, part, data.grouped, work)) for plan, part in zip(plans, parts, strict=True)]
    shards = [shard for of_plan in cut for shard in of_plan]
    new = sum(_tar_bytes(picture, data.grouped) for s in shards if not s.path.exists() for picture in s.pictures)
    _check_space(work.made.parent, new)
    import webdataset  # noqa: F401  # 2.6 s, for it imports torch: once, before the fork

    total = sum(len(shard.pictures) for shard in shards)
    results = parallel.each(
        _write_shard, shards, "packing", unit="pictures", total=total, workers=work.workers, progress=work.progress
    )
    made.refuse(results)
    scans = {shard.path: scan for shard, scan in zip(shards, results, strict=True) if isinstance(scan, Scan)}
    for plan, of_plan in zip(plans, cut, strict=True):
        index.write(plan.folder, [scans[shard.path] for shard in of_plan], data.classes)


def _say_growth(listed: list[list[Picture]], made: list[list[Picture]]) -> None:
    """Sources of quality 75 are often smaller than what quality 95 makes of their half."""
    before, after = (sum(picture.bytes for part in parts for picture in part) for parts in (listed, made))
    if 0 < before < after:
        print(
            f"the pictures grew from {before / 1e6:,.1f} to {after / 1e6:,.1f} MB: a lower --quality makes them smaller"
        )


def _least_bytes(plans: Sequence[_Plan], data: DataSet, work: _Work) -> int:
    """What is surely written before the shards' sizes are known."""
    if not work.recipe.keeps_bytes or work.made.exists():
        return 0
    of_files = sum(
        picture.bytes for plan in plans for picture in plan.pictures if not made.is_made(picture, work.recipe)
    )
    there = sum(path.stat().st_size for plan in plans for path in plan.folder.glob("shard-*.tar"))
    # Rows once as they are made and once in the shards.
    return max(0, of_files + 2 * sum(store.path.stat().st_size for store in data.stores) - there)


def _tar_bytes(picture: Picture, grouped: bool) -> int:
    sizes = [picture.bytes, len(str(picture.label)), len(picture.source)]
    if grouped:
        sizes.append(len(_group(picture)))
    return sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in sizes)


def _group(picture: Picture) -> bytes:
    return picture.group.encode(errors="backslashreplace")  # of a file's name that is no UTF-8


def _cut(plan: _Plan, pictures: list[Picture], grouped: bool, work: _Work) -> Iterator[_Shard]:
    """A picture that is larger than a shard gets one of its own."""
    start, filled, number = 0, 0, 0

    def shard(end: int) -> _Shard:
        path = plan.folder / f"shard-{number:06d}.tar"
        return _Shard(path, start, plan.root, work.made, grouped, pictures[start:end])

    for at, picture in enumerate(pictures):
        taken = _tar_bytes(picture, grouped)
        if at > start and (filled + taken + _RECORD > work.shard_bytes or at - start == work.shard_samples):
            yield shard(at)
            start, filled, number = at, 0, number + 1
        filled += taken
    yield shard(len(pictures))


def _write_shard(shard: _Shard) -> Scan | list[str]:
    """Write one shard, unless it is there, and scan it. Or returns what is wrong with its pictures."""
    from webdataset import TarWriter

    if shard.path.exists():
        parallel.advance(len(shard.pictures))
        return index.scan(shard.path)
    faults = []
    try:
        with rundir.appearing(shard.path) as file:
            # mtime=0 writes no PAX headers: reproducible, and 1.5 times faster to read.
            writer = TarWriter(file, user="vitdist", group="vitdist", mode=0o444, encoder=False, mtime=0)
            try:
                for number, picture in enumerate(shard.pictures, shard.first):
                    try:
                        writer.write(_sample(number, picture, shard))
                    except ValueError as error:
                        faults.append(str(error))
                    parallel.advance()
            finally:
                writer.close()  # before its file is: it would write to that when it is collected
            if faults:
                raise made.NotPictures
    except made.NotPictures:
        return faults
    return index.scan(shard.path)


def _sample(number: int, picture: Picture, shard: _Shard) -> dict[str, str | bytes]:
    content = made.read(shard.made, picture) if picture.store >= 0 else made.original(shard.root, picture)
    try:
        # A BMP or TIFF that is called .jpg is seen here only.
        kind, content = recode(content, Recipe())
    except ValueError as error:
        raise ValueError(f"{shard.root / os.fsdecode(picture.source)} ({error})") from None
    sample: dict[str, str | bytes] = {
        "__key__": f"{number:09d}",
        kind: content,
        LABEL: str(picture.label).encode(),
        SOURCE: picture.source,
    }
    if shard.grouped:
        sample[GROUP] = _group(picture)
    return sample


# ---- the demo's data ------------------------------------------------------------------------------


def write_digits(folder: str | Path) -> None:
    """scikit-learn's 1,797 scanned digits (8x8, grey) as PNG: FOLDER/train/<digit>/, every fifth in val/."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = [0] * 10
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        split = "val" if seen[label] % 5 == 4 else "train"
        seen[label] += 1
        path = Path(folder, split, str(label), f"{number:04d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(path)
