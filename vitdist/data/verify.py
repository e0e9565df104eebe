"""Are the shards what they were? Size, SHA-256, each sample's CRC, a test decode of each picture. No torch.

    vitdist verify shards                              # all splits in it
    vitdist verify shards/train                        # exit code 0: all is well, 1: something is broken
    vitdist verify shards/train --repair mended        # the same without the broken samples, in another folder
    vitdist verify FOLDER --label json:label           # tars without an index: what of them can be indexed

A set with an index is judged by it, so that a lost, cut, swapped or damaged shard costs the samples that are
hurt and no others, wherever its tar headers are damaged. Without one there is no CRC to go by: headers are
looked for behind the damage, and a sample counts if all its members are there and its picture decodes.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from isal.isal_zlib import crc32
from PIL import Image

from vitdist.data import index, parallel, reshard, storage, tar
from vitdist.data.index import LABEL, Index, Shard
from vitdist.data.storage import Place, Storage
from vitdist.data.tar import Part

_PIECE = 1 << 20
# The offset of "ustar" in a header, in both its spellings.
_MAGIC = 257


class Broken(NamedTuple):
    """A sample that cannot be used."""

    shard: str
    key: str
    label: str
    """Name of the class; as the shard has it where there is no index."""
    reason: str


@dataclass(frozen=True)
class Finding:
    """What became of one shard."""

    name: str
    fault: str
    """What is wrong with it as a file, empty if it is as it was."""
    samples: int
    bytes: int
    broken: list[Broken]
    odd: list[Broken]
    """Pictures that decode, with a warning by the decoder."""
    rows: list[int]
    """Of an indexed shard, the rows of the set that are broken."""
    spans: list[tuple[int, int]]
    """Of a shard without an index: first byte and end of each whole sample."""
    sha256: str


# ---- pictures ---------------------------------------------------------------------------------------


def fault(picture: bytes) -> tuple[str, str]:
    """Why a picture cannot be decoded, and what its decoder warns of; empty if nothing.

    All of it is decoded, where a training reads the part that its crop needs. libjpeg goes on over damaged
    data with a warning, which PIL swallows: the picture then is there, with grey or shifted stripes.
    """
    warning = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # palettes with transparency, large pictures: nothing that is broken
        try:
            with Image.open(io.BytesIO(picture)) as image:
                image.getexif()
                if image.format == "JPEG" and image.mode in ("L", "RGB"):
                    try:
                        simplejpeg.decode_jpeg(picture, "RGB")
                        return "", ""
                    except ValueError as error:
                        warning = str(error)
                image.convert("RGBA" if image.mode == "P" else "RGB")
        except Exception as error:  # decoders raise what they like for a damaged file
            return f"not decodable: {type(error).__name__}: {error}".replace("\n", " "), ""
    return "", f"decodes with a warning: {warning}" if warning else ""


# ---- a set with an index ----------------------------------------------------------------------------


_set: Index
"""What the processes of the pool look at: set before they are forked, for to pickle it costs its size."""


def _check(decode: bool, number: int) -> Finding:
    """Read one shard of `_set` whole, from its first byte to its last."""
    shard, place = _set.shards[number], _set.places[number].url
    rows = range(int(_set.starts[number]), int(_set.starts[number + 1]))
    wrong: dict[int, str] = {}
    odd: dict[int, str] = {}
    sha256, size, problem = "", 0, ""
    try:
        with _reading(place, shard) as (size, read):
            whole, at = hashlib.sha256(), 0
            for row in rows:
                _, start, length = _set.span(row)
                _through(read, at, start, whole)
                content = read(start, length)
                whole.update(content)
                at = start + length
                wrong[row], odd[row] = _sample_fault(row, content, length, decode)
                parallel.advance()
            _through(read, at, size, whole)
            sha256 = whole.hexdigest()
    except OSError as error:
        problem = "missing" if isinstance(error, FileNotFoundError) else f"not readable: {error.strerror or error}"
        reason = "its shard is missing" if problem == "missing" else problem
        parallel.advance(len(rows) - len(wrong))
        wrong = dict.fromkeys(rows, reason)
    if not problem and size < shard.bytes:
        problem = f"cut off: {size:,} of {shard.bytes:,} bytes are left" if size else "empty"
    elif not problem and sha256 != shard.sha256:
        more = f", {size - shard.bytes:,} bytes more" if size > shard.bytes else ""
        problem = f"changed since it was indexed{more}"
    bad = [row for row in rows if wrong.get(row)]
    return Finding(
        name=shard.name,
        fault=problem,
        samples=len(rows),
        bytes=size,
        broken=[_named(row, shard.name, wrong[row]) for row in bad],
        odd=[_named(row, shard.name, odd[row]) for row in rows if odd.get(row)],
        rows=bad,
        spans=[],
        sha256=sha256,
    )


def _named(row: int, shard: str, reason: str) -> Broken:
    return Broken(shard, _set.key(row), _set.classes[int(_set.labels[row])], reason)


def _sample_fault(row: int, content: bytes, length: int, decode: bool) -> tuple[str, str]:
    if len(content) < length:
        return "cut off: the shard ends before it does", ""
    if crc32(content) != _set.columns["crc32"][row]:
        return "changed since it was indexed (CRC)", ""
    if not decode:
        return "", ""
    start = int(_set.columns["image_offset"][row])
    return fault(content[start : start + int(_set.columns["image_size"][row])])


@contextlib.contextmanager
def _reading(place: str, shard: Shard) -> Iterator[tuple[int, Callable[[int, int], bytes]]]:
    """Size of a shard, and what reads some of its bytes, fewer behind its end. Raises OSError."""
    if storage.is_remote(place):
        size = storage.size(place)
        remote = Storage([Place(place, size, shard.sha256)])
        yield size, lambda at, length: remote.read(0, at, max(0, min(length, size - at)))
        return
    with open(place, "rb", buffering=0) as file:
        yield os.fstat(file.fileno()).st_size, lambda at, length: _pread(file.fileno(), at, length)


def _pread(descriptor: int, at: int, length: int) -> bytes:
    """`length` bytes or what there is: one call returns 2 GiB at most, and less on some file systems."""
    content = os.pread(descriptor, length, at)
    while len(content) < length and (more := os.pread(descriptor, length - len(content), at + len(content))):
        content += more
    return content


def _through(read: Callable[[int, int], bytes], at: int, end: int, whole: Any) -> None:
    """Hash what lies between two samples."""
    while at < end and (piece := read(at, min(_PIECE, end - at))):
        whole.update(piece)
        at += len(piece)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _exchanged(found: list[Finding]) -> tuple[list[Finding], dict[int, str]]:
    """Findings that say whose bytes a shard holds, and where the bytes of misplaced shards lie, by their number."""
    base = Path(_set.places[0].url).parent
    names = {shard.sha256: shard.name for shard in _set.shards}
    strays = [p for p in index.tars(base) if p.name not in names.values()] if base.is_dir() else []
    lies = {finding.sha256: _set.places[k].url for k, finding in enumerate(found) if finding.sha256}
    if any(finding.fault for finding in found):
        lies = {**{_sha256(path): str(path) for path in strays}, **lies}
    told, elsewhere = [], {}
    for number, (finding, shard) in enumerate(zip(found, _set.shards, strict=True)):
        words = finding.fault
        owner = names.get(finding.sha256)
        if words and owner:
            words = f"holds the bytes of {owner}"
        if words and (place := lies.get(shard.sha256)):
            elsewhere[number] = place
            words += f"; its own bytes lie in {Path(place).name}: give it its name"
            astray = [sample._replace(reason="its shard has another's name") for sample in finding.broken]
            finding = replace(finding, broken=astray)
        told.append(replace(finding, fault=words))
    for path in strays if base == Path(_set.folder) else ():
        told.append(Finding(path.name, "not in the index", 0, path.stat().st_size, [], [], [], [], ""))
    return told, elsewhere


# ---- tars without an index --------------------------------------------------------------------------


class Salvage(NamedTuple):
    """What of a damaged tar can still be told apart."""

    whole: list[list[Part]]
    torn: list[list[Part]]
    """Samples beside a damage, of which members may be lost."""
    gaps: list[tuple[int, int]]
    """First byte and end of what no header leads to."""


def salvage(source: tar.File, usual: frozenset[str] = frozenset()) -> Salvage:
    """Walk a tar, and behind each damage look for the next header that is whole.

    `usual`: the members that a sample beside a damage must have, if no other sample of this tar tells.
    """
    at, gaps = 0, list[tuple[int, int]]()
    groups, beside = list[list[Part]](), set[int]()
    while True:
        end, key, first = at, None, len(groups)
        with contextlib.suppress(ValueError):
            for part in tar.walk(_Behind(source, at), ""):  # type: ignore[arg-type]
                part = part._replace(start=part.start + at, payload=part.payload + at, end=part.end + at)
                if part.key != key:
                    groups.append([])
                key, end = part.key, part.end
                groups[-1].append(part)
        if gaps and len(groups) > first:
            beside.add(first)
        following = _next_header(source, end if end > at else at + tar.BLOCK)
        if following is None and end + tar.BLOCK <= source.length and _zeros(source, end):
            break
        beside.add(len(groups) - 1)
        gaps.append((end, source.length if following is None else following))
        if following is None:
            break
        at = following
    common = Counter(_extensions(g) for k, g in enumerate(groups) if k not in beside).most_common(1)
    usual = common[0][0] if common else usual
    torn = {k for k in beside if k >= 0 and not (usual and _extensions(groups[k]) >= usual)}
    whole = [group for k, group in enumerate(groups) if k not in torn]
    return Salvage(whole, [groups[k] for k in sorted(torn)], [gap for gap in gaps if gap[0] < gap[1]])


class _Behind:
    """What of a tar lies behind its first `at` bytes."""

    def __init__(self, source: tar.File, at: int) -> None:
        self._source, self._at, self.length = source, at, max(0, source.length - at)

    def read(self, at: int, size: int) -> bytes:
        return self._source.read(self._at + at, min(size, self.length - at))


def _extensions(parts: Sequence[Part]) -> frozenset[str]:
    return frozenset(part.extension for part in parts)


def _next_header(source: tar.File, at: int) -> int | None:
    """Place of the first header from `at` on that has the magic word and whose checksum holds."""
    at += -at % tar.BLOCK
    while at + tar.BLOCK <= source.length:
        piece = source.read(at, _PIECE)
        found = piece.find(b"ustar")
        while found >= 0:
            start = found - _MAGIC
            if start >= 0 and start % tar.BLOCK == 0:
                with contextlib.suppress(tarfile.HeaderError):
                    tarfile.TarInfo.frombuf(piece[start : start + tar.BLOCK], "utf-8", "surrogateescape")
                    return at + start
            found = piece.find(b"ustar", found + 1)
        at += _PIECE
    return None


def _zeros(source: tar.File, at: int) -> bool:
    while piece := source.read(at, _PIECE):
        if piece.count(0) < len(piece):
            return False
        at += len(piece)
    return True


def _usual(paths: Sequence[Path]) -> frozenset[str]:
    """The members of the first sample of the first tar that begins with a whole one."""
    for path in paths:
        with contextlib.suppress(ValueError), open(path, "rb", buffering=0) as file:
            for parts in tar.samples(tar.File(file.fileno()), path.name):
                return _extensions(parts)
    return frozenset()


def _check_unindexed(label: str, decode: bool, usual: frozenset[str], path: Path) -> Finding:
    """Whether a tar can be indexed, and which of its samples are whole."""
    try:
        index.scan(path, label)
        problem = ""
    except (ValueError, OSError) as error:
        problem = str(error).removeprefix(f"{path}: ")
    broken, odd, spans, seen = list[Broken](), list[Broken](), list[tuple[int, int]](), set[str]()
    with open(path, "rb", buffering=0) as file:
        source = tar.File(file.fileno())
        found = salvage(source, usual)
        for parts in found.whole:
            key, name, reason, warning = parts[0].key, "", "", ""
            try:
                _, by_extension = index._row(parts, path.name)
                name = index._label(source, by_extension, label, path.name, key)
                if decode:
                    picture = next(part for part in parts if part.extension in index.IMAGES)
                    reason, warning = fault(_pread(file.fileno(), picture.payload, picture.size))
            except ValueError as error:
                reason = str(error).removeprefix(f"{path.name}: ")
            if key in seen:
                reason = "its key came before"
            seen.add(key)
            if problem and warning and not reason:  # nothing else can tell damaged bytes of a JPEG
                reason, warning = warning, ""
            if reason:
                broken.append(Broken(path.name, key, name, reason))
            else:
                spans.append((parts[0].start, parts[-1].end))
            if warning:
                odd.append(Broken(path.name, key, name, warning))
        for parts in found.torn:
            members = ", ".join(sorted(_extensions(parts)))
            broken.append(Broken(path.name, parts[0].key, "", f"beside a damage: only {members} is left"))
    if found.gaps and problem:
        lost = "; ".join(f"{first:,} to {end:,}" for first, end in found.gaps[:5])
        problem += f" (bytes {lost} lead to no sample)"
    size = source.length
    return Finding(path.name, problem, len(spans) + len(broken), size, broken, odd, [], spans, "")


# ---- the command ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    folder: str
    indexed: bool
    shards: list[Finding]
    elsewhere: dict[int, str]
    """Number of a shard -> where its bytes lie, if under another name."""

    @property
    def broken(self) -> list[Broken]:
        return [sample for shard in self.shards for sample in shard.broken]

    @property
    def ok(self) -> bool:
        return not self.broken and not any(shard.fault for shard in self.shards)

    def reasons(self) -> Counter[str]:
        return Counter(sample.reason.partition(":")[0] for sample in self.broken)


def verify(
    folder: str | Path,
    *,
    decode: bool = True,
    label: str = LABEL,
    workers: int | None = None,
    progress: bool = True,
) -> Result:
    """Look at every byte of a set. Raises ValueError for a folder that holds none."""
    global _set
    folder = Path(folder) if not storage.is_remote(str(folder)) else str(folder)
    if isinstance(folder, Path) and not (folder / "index.json").exists() and folder.is_dir() and index.tars(folder):
        paths = index.tars(folder)
        work = partial(_check_unindexed, label, decode, _usual(paths))
        found = parallel.each(work, paths, "verifying", workers=workers, progress=progress)
        return Result(str(folder), False, found, {})
    _set = Index.open(folder, check=False)
    work_on = partial(_check, decode)
    numbers = range(len(_set.shards))
    found = parallel.each(
        work_on, numbers, "verifying", unit="samples", total=len(_set), workers=workers, progress=progress
    )
    told, elsewhere = ([*found], {}) if storage.is_remote(_set.places[0].url) else _exchanged(found)
    return Result(str(folder), True, told, elsewhere)


def repair(
    result: Result, out: str | Path, *, label: str = LABEL, workers: int | None = None, progress: bool = True
) -> str:
    """Write what is whole into `out`, and removed.txt with what is not; returns what is to be said of it."""
    out, folder = Path(out), result.folder
    if not storage.is_remote(folder) and out.resolve() == Path(folder).resolve():
        raise ValueError(f"{out}: shards are not mended in place: name another folder")
    whole = sum(s.samples - len(s.broken) for s in result.shards) + len(result.elsewhere)
    if not whole:
        raise ValueError(f"{folder}: no sample is whole: nothing to write")
    kept = {s.name: [s.rows, s.spans] for s in result.shards}
    wanted = json.dumps([1, folder, result.indexed, label, kept])
    lost = [b for k, s in enumerate(result.shards) if k not in result.elsewhere for b in s.broken]
    if not reshard.prepare(out, wanted):
        (_repair_indexed if result.indexed else _repair_unindexed)(result, out, label, workers, progress)
        lines = ("\t".join((b.shard, b.key, b.label, b.reason)) + "\n" for b in lost)
        (out / "removed.txt").write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    written, before = Index.open(out), Counter(b.label for b in lost)
    said = [f"{out}: {len(written):,} samples are whole, {len(lost):,} left out (removed.txt names them)"]
    for name, count in zip(written.classes, written.counts, strict=True):
        if before[name] or not count:
            rest = f"{count:,} left" if count else "none left: a run needs some"
            said.append(f"  {name}: {before[name]:,} left out, {rest}")
    if before[""]:
        said.append(f"  of unknown class: {before['']:,} left out")
    return "\n".join(said)


def _repair_indexed(result: Result, out: Path, label: str, workers: int | None, progress: bool) -> None:
    source = Index.open(result.folder, check=False)
    places = [place._replace(url=result.elsewhere.get(k, place.url)) for k, place in enumerate(source.places)]
    source = replace(source, places=places)
    plans = []
    for number, (shard, finding) in enumerate(zip(source.shards, result.shards, strict=False)):
        rows = np.arange(source.starts[number], source.starts[number + 1])
        if number not in result.elsewhere:
            rows = np.setdiff1d(rows, finding.rows)
        if len(rows):
            plans.append(reshard.Plan(out / shard.name, 0, rows))
    groups = source.groups() or [""] * len(source)
    index.write(
        out, reshard.write(source, groups, plans, what="writing", workers=workers, progress=progress), source.classes
    )


def _repair_unindexed(result: Result, out: Path, label: str, workers: int | None, progress: bool) -> None:
    whole = [shard for shard in result.shards if shard.spans]
    work = partial(_rewrite, Path(result.folder), out, label)
    scans = parallel.each(work, whole, "writing", workers=workers, progress=progress)
    names = Path(result.folder, "classes.txt")
    index.write(out, scans, index.read_classes(names) if names.exists() else None)


def _rewrite(folder: Path, out: Path, label: str, shard: Finding) -> index.Scan:
    with open(folder / shard.name, "rb", buffering=0) as file:
        reshard.write_shard(
            out / shard.name, lambda: (_pread(file.fileno(), start, end - start) for start, end in shard.spans)
        )
    return index.scan(out / shard.name, label)


def run(
    folder: str | Path,
    *,
    decode: bool = True,
    label: str = LABEL,
    out: str | Path | None = None,
    as_json: bool = False,
    workers: int | None = None,
) -> int:
    """The command: print what is found, write what is whole into `out` if not all is; returns the exit code.

    A folder that holds splits stands for all of them, in `out` too.
    """
    if Path(folder).is_file():
        raise ValueError(f"{folder} is one shard: give the folder that it lies in, {Path(folder).parent}")
    inside: list[str | Path] = [] if storage.is_remote(str(folder)) else [*_splits(Path(folder))]
    results = []
    for part in inside or [folder]:
        result = verify(part, decode=decode, label=label, workers=workers)
        results.append(result)
        if not as_json:
            print(text(result))
            _print_reasons(result)
        if out and result.ok:
            print(f"{part}: nothing to repair, it is not written again", file=sys.stderr)
        if out and not result.ok:
            said = repair(result, Path(out, Path(part).name) if inside else out, label=label, workers=workers)
            print(said, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        told = [record(result) for result in results]
        print(json.dumps(told if inside else told[0], indent=1, ensure_ascii=False))
    ok = all(result.ok for result in results)
    if not ok and not out and not as_json:
        print(f"to write what is whole into another folder: vitdist verify {folder} --repair OUT")
    return 0 if ok else 1


def _splits(folder: Path) -> list[Path]:
    """Sets in a folder that is none itself."""
    if not folder.is_dir() or (folder / "index.json").exists() or index.tars(folder):
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and ((p / "index.json").exists() or index.tars(p)))


def record(result: Result) -> dict[str, Any]:
    """What is found, for machines."""
    return {
        "folder": result.folder,
        "ok": result.ok,
        "indexed": result.indexed,
        "shards": [
            {"name": s.name, "fault": s.fault, "bytes": s.bytes, "samples": s.samples, "broken": len(s.broken)}
            for s in result.shards
        ],
        "broken": [sample._asdict() for sample in result.broken],
        "warnings": [sample._asdict() for shard in result.shards for sample in shard.odd],
        "reasons": dict(result.reasons()),
    }


def text(result: Result) -> str:
    """A line for each shard with a fault and each broken sample, and a summary."""
    lines = []
    for shard in result.shards:
        if shard.fault:
            share = f": {len(shard.broken):,} of {shard.samples:,} samples broken" if shard.samples else ""
            lines.append(f"{shard.name}: {shard.fault}{share}")
        if len(shard.broken) == shard.samples > 1 and len({b.reason for b in shard.broken}) == 1:
            continue  # the shard's line says it all
        lines += [f"{b.shard}  {b.key}  {b.label or '-'}  {b.reason}" for b in shard.broken]
    odd = [sample for shard in result.shards for sample in shard.odd]
    lines += [f"{b.shard}  {b.key}  {b.label or '-'}  {b.reason}" for b in odd[:10]]
    if len(odd) > 10:
        lines.append(f"... {len(odd) - 10:,} more decode with a warning (--json names all)")
    samples, size = sum(s.samples for s in result.shards), sum(s.bytes for s in result.shards)
    what = f"{result.folder}: {samples:,} samples in {len(result.shards):,} shards, {size / 1e6:,.1f} MB"
    if result.ok:
        lines.append(f"{what}: all is well" + ("" if result.indexed else f"; run: vitdist index {result.folder}"))
    else:
        faulty = sum(bool(shard.fault) for shard in result.shards)
        lines.append(f"{what}: {len(result.broken):,} samples broken, {faulty:,} shards not as they should be")
    return "\n".join(lines)


def _print_reasons(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("reason", "samples")
    for reason, count in result.reasons().most_common():
        table.add_row(reason, f"{count:,}")
    if table.row_count:
        Console().print(table)
