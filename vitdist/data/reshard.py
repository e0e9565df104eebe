"""Indexed shards into new ones: of another size, mixed, several sets as one. Imports no torch.

    vitdist reshard shards/train OUT --shard-megabytes 512
    vitdist reshard shards/train OUT --shuffle 0             # class after class in the source: mixed in OUT
    vitdist reshard hospital-a/train hospital-b/train OUT    # sets with the same classes, one after the other

Samples are copied byte for byte, members that vitdist does not know included, each verified by its CRC. The
bytes written depend on the sources and the options only. A shard appears whole or not at all; the same command
goes on where it was interrupted. Members that belong to no sample (a README) stay behind.
"""

import errno
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from vitdist import rundir
from vitdist.data import index, parallel, tar
from vitdist.data.index import COLUMNS, GROUP, IMAGES, LABEL, SOURCE, Index, Scan, Shard

# What every tar ends on a multiple of, as tarfile and GNU tar write it.
_RECORD = 20 * tar.BLOCK
_PLAN = ".reshard.json"
# Spans asked for ahead of the one that is read: random reads of a shuffled set then overlap.
_AHEAD = 16


class Span(NamedTuple):
    """All members of one sample, as they are written."""

    content: bytes
    image_offset: int
    image_size: int


class Plan(NamedTuple):
    """One shard to write."""

    path: Path
    first: int
    """Number of its first sample in the set, its key where keys are numbered anew."""
    rows: np.ndarray
    """int64, of the source."""


class Rules(NamedTuple):
    numbered: bool = False
    """Keys are numbers; the old key becomes the member `path` of a sample that has none."""
    only_used: bool = False
    """Picture, label, path and group alone, the label as `cls`."""


BYTE_FOR_BYTE = Rules()


def reshard(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    shard_bytes: int = 256 << 20,
    shuffle: int | None = None,
    only_used: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Write the samples of `sources` as one new set; say so on stdout.

    Raises ValueError in one line for sources of different classes, a sample that is broken, an `out` that
    holds something else and a disk that is full.
    """
    sets, out = [Index.open(source) for source in sources], Path(out)
    _refuse(sets, out, shard_bytes, shuffle)
    source = index.join(sets)
    keys = source.keys()
    rules = Rules(numbered=len(set(keys)) < len(keys), only_used=only_used)
    order = np.arange(len(source)) if shuffle is None else shuffled(len(source), shuffle)
    plans = cut(source, order, out, shard_bytes, rules)
    wanted = json.dumps([1, [part.digest for part in sets], shard_bytes, shuffle, only_used])
    if not prepare(out, wanted):
        groups = [group for part in sets for group in part.groups() or [""] * len(part)]
        scans = write(source, groups, plans, rules=rules, what="resharding", workers=workers, progress=progress)
        index.write(out, scans, source.classes)
    print(_summary(sets, out, rules))


def shuffled(samples: int, seed: int) -> np.ndarray:
    """A permutation of int64 [samples]. Philox's raw numbers are the same in every version of NumPy."""
    return np.argsort(np.random.Philox(key=seed).random_raw(samples), kind="stable")


def cut(source: Index, order: np.ndarray, out: Path, shard_bytes: int, rules: Rules) -> list[Plan]:
    """The shards that hold the rows of `order`, each closed before it exceeds `shard_bytes`."""
    # A member of a few bytes takes two blocks: cls, path and group, beside the picture's header and last block.
    sizes = source.columns["image_size" if rules.only_used else "size"][order].astype(np.int64)
    sizes += 8 * tar.BLOCK if rules.only_used else 2 * tar.BLOCK if rules.numbered else 0
    firsts, filled = [0], 0
    for number, size in enumerate(sizes.tolist()):
        if filled and filled + size + _RECORD > shard_bytes:
            firsts.append(number)
            filled = 0
        filled += size
    return [
        Plan(out / f"shard-{k:06d}.tar", first, order[first:end])
        for k, (first, end) in enumerate(zip(firsts, [*firsts[1:], len(order)], strict=True))
    ]


def _refuse(sets: list[Index], out: Path, shard_bytes: int, shuffle: int | None) -> None:
    if shard_bytes < 1 << 20:
        raise ValueError(f"--shard-megabytes {shard_bytes / 1e6:g}: at least 1.05, 1 MiB")
    if shuffle is not None and not 0 <= shuffle < 2**64:
        raise ValueError(f"--shuffle {shuffle}: a number from 0 to 2^64 - 1")
    twice = {part.digest: part for part in sets}
    if len(twice) < len(sets):
        raise ValueError(f"{sets[-1].folder}: its samples are given twice: name each set once")
    for part in sets:
        if out.resolve() == Path(part.folder).resolve():
            raise ValueError(f"{out} is a source itself: write into another folder")


def _summary(sets: list[Index], out: Path, rules: Rules) -> str:
    written = Index.open(out)
    before, after = (sum(s.bytes for part in parts for s in part.shards) / 1e6 for parts in (sets, [written]))
    shards = sum(len(part.shards) for part in sets), len(written.shards)
    said = (
        f"{out}: {len(written):,} samples of {len(written.classes):,} classes, {shards[0]:,} -> {shards[1]:,} shards, "
        f"{before:,.1f} -> {after:,.1f} MB, digest {written.digest[:12]}"
    )
    return said + ("\nkeys clashed, so they are numbers now; the old ones are in .path" if rules.numbered else "")


# ---- writing a set: shared with `vitdist verify --repair` -------------------------------------------


def prepare(out: Path, wanted: str) -> bool:
    """Whether `out` holds what `wanted` describes already; if not, it is made ready to be filled.

    Raises ValueError if something else is there.
    """
    plan = hashlib.sha256(wanted.encode()).hexdigest()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder")
    present = list(out.iterdir()) if out.is_dir() else []
    if present:
        if (rundir.read_json(out / _PLAN) or {}).get("plan") != plan:
            raise ValueError(f"{out} holds other files: write into another folder, or remove it first")
        if (out / "index.json").exists():
            Index.open(out)
            return True
        for path in present:
            if path.name.startswith(".") and ".tar." in path.name:
                path.unlink()  # left by a command that was killed
    rundir.publish_json(out / _PLAN, {"plan": plan})
    return False


_source: Index
"""What the processes of the pool read: set before they are forked, for to pickle it costs its size."""


def write(
    source: Index,
    groups: Sequence[str],
    plans: Sequence[Plan],
    *,
    rules: Rules = BYTE_FOR_BYTE,
    what: str,
    workers: int | None = None,
    progress: bool = True,
) -> list[Scan]:
    """Write the shards of `plans`, in parallel; `groups` of each row of `source`. Raises ValueError."""
    global _source
    _source = source
    folder = plans[0].path.parent
    coming = sum(int(source.columns["size"][p.rows].sum(dtype=np.int64)) for p in plans if not p.path.exists())
    free = shutil.disk_usage(folder).free
    if coming > free:
        raise ValueError(f"{folder}: {coming / 1e6:,.0f} MB to write, {free / 1e6:,.0f} MB free: make room first")
    rows = sum(len(plan.rows) for plan in plans)
    work = partial(_write, rules)
    try:
        scans = parallel.each(work, plans, what, unit="samples", total=rows, workers=workers, progress=progress)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"{folder}: the disk is full ({error.strerror}): make room and run the same again") from None
    return [s._replace(groups=[groups[r] for r in p.rows.tolist()]) for s, p in zip(scans, plans, strict=True)]


def _write(rules: Rules, plan: Plan) -> Scan:
    keys: list[str] = []
    rows: list[tuple[int, ...]] = []

    def spans() -> Iterator[bytes]:
        at, waiting = 0, plan.rows.tolist()
        for place, row in enumerate(waiting):
            for later in waiting[place + _AHEAD : place + _AHEAD + 1] if place else waiting[1 : _AHEAD + 1]:
                _source.storage.expect(*_source.span(later))
            key = f"{plan.first + place:09d}" if rules.numbered else _source.key(row)
            span = _span(row, key, rules)
            rows.append((at, len(span.content), span.image_offset, span.image_size, crc32(span.content)))
            keys.append(key)
            at += len(span.content)
            yield span.content
            parallel.advance()

    size, sha256 = write_shard(plan.path, spans)
    names = ("offset", "size", "image_offset", "image_size", "crc32")
    columns = {n: np.array(values, COLUMNS[n]) for n, values in zip(names, zip(*rows, strict=True), strict=True)}
    labels = [str(label) for label in _source.labels[plan.rows].tolist()]
    return Scan(Shard(plan.path.name, size, len(keys), sha256), columns, labels, keys, [])


def _span(row: int, key: str, rules: Rules) -> Span:
    """What is written of a sample. Raises ValueError if it is not what was indexed."""
    try:
        content = _source.read(row)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; to leave broken samples out: vitdist verify FOLDER --repair OUT") from None
    image_offset, image_size = (int(_source.columns[name][row]) for name in ("image_offset", "image_size"))
    if not rules.numbered and not rules.only_used:
        return Span(content, image_offset, image_size)
    parts = list(tar.walk(tar.Bytes(content), f"sample {key}"))
    members = {part.extension: content[part.payload : part.payload + part.size] for part in parts}
    if rules.only_used:
        members = {e: c for e, c in members.items() if e in (*IMAGES, SOURCE, GROUP)}
        members = {LABEL: str(_source.labels[row]).encode(), **members}
    if rules.numbered:
        members.setdefault(SOURCE, parts[0].key.encode(errors="surrogateescape"))
    written, place = b"", (0, 0)
    for extension, payload in members.items():
        # The key as the tar has it: that of the index has escapes for what is no UTF-8.
        head = _header(f"{key if rules.numbered else parts[0].key}.{extension}", len(payload))
        if extension in IMAGES:
            place = len(written) + len(head), len(payload)
        written += head + payload + bytes(-len(payload) % tar.BLOCK)
    return Span(written, *place)


def _header(name: str, size: int) -> bytes:
    """A tar header as `vitdist pack` has them: nothing in it of who wrote it, or when."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = size, 0o444, "vitdist", "vitdist"
    return info.tobuf(tarfile.PAX_FORMAT)


def write_shard(path: Path, spans: Callable[[], Iterable[bytes]]) -> tuple[int, str]:
    """Write `spans` and a tar's end to `path`, whole or not at all; returns its size and SHA-256.

    A shard that an interrupted command left there whole is not written again, only hashed: its spans are the same.
    """
    whole, size = hashlib.sha256(), 0
    with open(os.devnull, "wb") if path.exists() else rundir.appearing(path) as file:
        for content in _ended(spans()):
            file.write(content)
            whole.update(content)
            size += len(content)
    return size, whole.hexdigest()


def _ended(spans: Iterable[bytes]) -> Iterator[bytes]:
    size = 0
    for span in spans:
        size += len(span)
        yield span
    yield bytes(-(size + 2 * tar.BLOCK) % _RECORD + 2 * tar.BLOCK)
