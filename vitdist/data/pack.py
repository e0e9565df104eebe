"""Folder of pictures -> indexed WebDataset tar shards, with the original bytes.

    vitdist pack PICTURES OUT                       PICTURES/CLASS/**.jpg             -> OUT/train
    vitdist pack PICTURES OUT --val-fraction 0.1    the same, a tenth of each class   -> OUT/val
    vitdist pack PICTURES OUT                       PICTURES/train/CLASS, .../val/CLASS -> OUT/train, OUT/val

The bytes of the shards depend on the names and contents of the pictures only, not on who packs, when, or in
how many processes. A shard appears whole or not at all; packing again goes on where it was interrupted.
Pictures are split and shuffled by a hash of their names: where several show the same patient or part, sort
them into train/ and val/ by that yourself.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import NamedTuple

from vitdist import rundir
from vitdist.data import index
from vitdist.data.index import IMAGES, LABEL, SOURCE, Index, Scan

# A tar is cut into blocks, and ends on a multiple of 20 of them.
_BLOCK, _RECORD = 512, 20 * 512
_PLAN = ".pack.json"
# In the order of preference. A data set with both has its test set packed too, for the end.
_VALIDATION = ("val", "valid", "validation")


class Picture(NamedTuple):
    path: Path
    source: bytes
    """Path below the packed folder, as the file system spells it."""
    label: int
    bytes: int
    changed: int
    """Modification time, ns."""


@dataclass(frozen=True)
class _ShardPlan:
    path: Path
    first: int
    """Number of the first sample in its split. Keys are numbers: names may hold any script and dots."""
    pictures: list[Picture]


def pack(
    source: str | Path,
    out: str | Path,
    *,
    val_fraction: float = 0,
    shard_bytes: int = 256 << 20,
    shard_samples: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Write OUT/train and, where there is one, OUT/val and OUT/test, for `Index.open`; say so on stdout.

    A shard is closed before it exceeds `shard_bytes` or `shard_samples`. Raises ValueError in one line for
    a folder that is no data set, files that are no pictures, and an OUT that holds something else.
    """
    source, out = Path(source), Path(out)
    classes, splits, ignored = _splits(source, val_fraction)
    plans = {name: _plan(out / name, part, shard_bytes, shard_samples) for name, part in splits.items()}
    waiting = {name: plan for name, plan in plans.items() if not _is_packed(out / name, classes, plan)}
    shards = [shard for plan in waiting.values() for shard in plan]
    scans = _write_all(shards, workers, progress) if shards else {}
    for name, plan in waiting.items():
        index.write(out / name, [scans[shard.path] for shard in plan], classes)
    for name in plans:
        _say(out / name, "packed" if name in waiting else "already packed:")
    if ignored:
        print(f"left out {len(ignored):,} files that are not {', '.join(IMAGES)}, such as {ignored[0]}")
    if "val" not in plans:
        print("no validation set, and a run needs one: pack into another folder with --val-fraction 0.1")


def _say(folder: Path, verb: str) -> None:
    packed = Index.open(folder)
    size = sum(shard.bytes for shard in packed.shards) / 1e6
    shards = f"{len(packed.shards):,} shard{'s' * (len(packed.shards) > 1)}"
    print(
        f"{verb} {len(packed):,} pictures of {len(packed.classes):,} classes in {folder} "
        f"({shards}, {size:,.1f} MB, digest {packed.digest[:12]})"
    )


# ---- what there is --------------------------------------------------------------------------------


def _splits(source: Path, val_fraction: float) -> tuple[list[str], dict[str, list[Picture]], list[Path]]:
    """Class names, the pictures of each split in the order of the shards, and files left out."""
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder of pictures")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"--val-fraction must be at least 0 and below 1, not {val_fraction}")
    given = _given_splits(source)
    if given and val_fraction and len(given) > 1:
        raise ValueError(f"{source} has {given['val'].name}/ already: leave out --val-fraction")
    classes = _folders(given.get("train", source))
    ignored: list[Path] = []
    splits = {
        name: _shuffled(list(_pictures(folder, classes, ignored)))
        for name, folder in (given or {"train": source}).items()
    }
    for name, pictures in splits.items():
        if not pictures:
            folder = given.get(name, source)
            raise ValueError(f"{folder}: no pictures ({', '.join(IMAGES)}) in folders named by their class")
    empty = set(range(len(classes))) - {picture.label for picture in splits["train"]}
    if empty:
        folder = given.get("train", source) / classes[min(empty)]
        raise ValueError(f"{folder}: a class without pictures ({', '.join(IMAGES)}): remove or fill it")
    if len(classes) < 2:
        raise ValueError(f"{source}: a single class, {classes[0]!r}: put each class into a folder of its own")
    if val_fraction:
        splits["train"], splits["val"] = _stratified(splits["train"], val_fraction)
    return classes, splits, ignored


def _given_splits(source: Path) -> dict[str, Path]:
    """Split -> folder if `source` is laid out as train/CLASS, val/CLASS; empty if its folders are classes."""
    folders = _folders(source)
    found = [name for name in (*_VALIDATION, "test") if name in folders]
    if "train" not in folders or not _folders(source / "train") or not (found or folders == ["train"]):
        return {}
    splits = {"train": source / "train"}
    if found:
        splits["val"] = source / found[0]
    if "test" in found[1:]:
        splits["test"] = source / "test"
    return splits


def _folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _pictures(folder: Path, classes: list[str], ignored: list[Path]) -> Iterator[Picture]:
    labels = {name: label for label, name in enumerate(classes)}
    for name in _folders(folder):
        if name not in labels:
            raise ValueError(f"{folder}/{name}: a class that the training pictures do not have")
        for parent, inner, files in os.walk(folder / name, followlinks=True):
            inner[:] = [child for child in inner if not child.startswith(".")]
            for file in files:
                path = Path(parent, file)
                if file.startswith("."):  # .DS_Store and the ._NAME.jpg that macOS leaves in archives
                    continue
                if path.suffix[1:].lower() not in IMAGES:
                    ignored.append(path)
                    continue
                with _naming(path):
                    status = path.stat()
                below = os.fsencode(path.relative_to(folder))
                yield Picture(path, below, labels[name], status.st_size, status.st_mtime_ns)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _shuffled(pictures: list[Picture]) -> list[Picture]:
    return sorted(pictures, key=lambda picture: hashlib.blake2b(picture.source, digest_size=16).digest())


def _stratified(pictures: list[Picture], fraction: float) -> tuple[list[Picture], list[Picture]]:
    """Training and validation: of each class `fraction`, at least one picture, if it has two."""
    by_class: dict[int, list[Picture]] = {}
    for picture in pictures:
        by_class.setdefault(picture.label, []).append(picture)
    held_out = {
        picture.source
        for members in by_class.values()
        for picture in members[: min(len(members) - 1, max(1, round(fraction * len(members))))]
    }
    parts = [p for p in pictures if p.source not in held_out], [p for p in pictures if p.source in held_out]
    if not parts[1]:
        raise ValueError("no class has two pictures: none can be held out for validation")
    return parts


# ---- shards ---------------------------------------------------------------------------------------


def _plan(folder: Path, pictures: list[Picture], shard_bytes: int, shard_samples: int | None) -> list[_ShardPlan]:
    shards: list[_ShardPlan] = []
    filled = 0
    for number, picture in enumerate(pictures):
        taken = sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in (picture.bytes, 1, len(picture.source)))
        if not shards or filled + taken + _RECORD > shard_bytes or len(shards[-1].pictures) == shard_samples:
            shards.append(_ShardPlan(folder / f"shard-{len(shards):06d}.tar", number, []))
            filled = 0
        shards[-1].pictures.append(picture)
        filled += taken
    return shards


def _is_packed(folder: Path, classes: list[str], plan: list[_ShardPlan]) -> bool:
    """Whether `folder` holds this very data set. Prepares it to be filled if not.

    Raises ValueError if something else is there.
    """
    content = [
        [shard.path.name, picture.source.hex(), picture.label, picture.bytes, picture.changed]
        for shard in plan
        for picture in shard.pictures
    ]
    wanted = hashlib.sha256(json.dumps([index.VERSION, classes, content]).encode()).hexdigest()
    present = list(folder.iterdir()) if folder.is_dir() else []
    if present:
        record = rundir.read_json(folder / _PLAN)
        if record is None or record["plan"] != wanted:
            raise ValueError(f"{folder} holds other files: pack into another folder, or remove it first")
        if (folder / "index.json").exists():
            Index.open(folder)
            return True
        for path in present:
            if path.name.startswith(".shard-"):
                path.unlink()  # left by a pack that was killed
    rundir.publish_json(folder / _PLAN, {"plan": wanted})
    return False


def _write_all(shards: list[_ShardPlan], workers: int | None, progress: bool) -> dict[Path, Scan]:
    """Write and scan every shard, in parallel. Raises ValueError naming the files that are no pictures."""
    import webdataset  # noqa: F401  # 2.6 s, for it imports torch: once, before the fork

    context = multiprocessing.get_context("fork")
    done = context.Value("q", 0)
    workers = min(workers or len(os.sched_getaffinity(0)), len(shards))
    pool = ProcessPoolExecutor(workers, context, _in_worker, (done,))
    try:
        futures = {pool.submit(_write, shard): shard.path for shard in shards}
        with _progress_bar(sum(len(shard.pictures) for shard in shards), progress) as show:
            waiting = set(futures)
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                show(done.value)
                for future in finished:
                    future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    results = {path: future.result() for future, path in futures.items()}
    faults = [fault for result in results.values() if isinstance(result, list) for fault in result]
    if faults:
        named = "; ".join(sorted(faults)[:5]) + (f" and {len(faults) - 5:,} more" if len(faults) > 5 else "")
        raise ValueError(f"not pictures: {named}: remove or replace them, then pack again")
    return {path: scan for path, scan in results.items() if isinstance(scan, Scan)}


@contextlib.contextmanager
def _progress_bar(total: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A function that shows how many pictures are done: a bar on a terminal, nothing in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    speed = TextColumn("{task.fields[speed]} pictures/s")
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal)) as bar:
        task = bar.add_task("", total=total, speed="-")

        def show(done: int) -> None:
            bar.update(task, completed=done, speed=f"{done / max(bar.tasks[0].elapsed or 0, 0.1):,.0f}")

        yield show


_done: Synchronized
"""Pictures done by all processes; set in each of them."""


def _in_worker(done: Synchronized) -> None:
    global _done
    _done = done
    index.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the pool


def _write(shard: _ShardPlan) -> Scan | list[str]:
    """Write one shard, unless it is there, and scan it. Or returns what is wrong with its pictures."""
    from webdataset import TarWriter

    if not shard.path.exists():
        temporary = shard.path.with_name(f".{shard.path.name}.{os.getpid()}")
        faults = []
        with open(temporary, "wb") as file:
            # mtime=0 writes no PAX headers: reproducible, and 1.5 times faster to read.
            writer = TarWriter(file, user="vitdist", group="vitdist", mode=0o444, encoder=False, mtime=0)
            for number, picture in enumerate(shard.pictures, shard.first):
                try:
                    writer.write(_sample(number, picture))
                except ValueError as error:
                    faults.append(str(error))
                with _done.get_lock():
                    _done.value += 1
            writer.close()
            file.flush()
            os.fsync(file.fileno())
        if faults:
            temporary.unlink()
            return faults
        os.replace(temporary, shard.path)
        rundir.sync_folder(shard.path.parent)
    else:
        with _done.get_lock():
            _done.value += len(shard.pictures)
    return index.scan(shard.path)


def _sample(number: int, picture: Picture) -> dict[str, str | bytes]:
    with _naming(picture.path):
        content = picture.path.read_bytes()
    if len(content) != picture.bytes:
        raise ValueError(f"{picture.path}: changed while it was packed")
    return {
        "__key__": f"{number:09d}",
        _kind(content, picture.path): content,
        LABEL: str(picture.label).encode(),
        SOURCE: picture.source,
    }


def _kind(content: bytes, path: Path) -> str:
    """Format by content, for many a .jpg is a PNG. Raises ValueError for what is none of IMAGES."""
    if content.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "webp"
    raise ValueError(f"{path} ({'empty' if not content else f'begins with {content[:4]!r}'})")


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
