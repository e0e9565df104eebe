"""What is in shards: a line for each sample, and single members of one. Imports no torch.

vitdist ls shards/train | head                        # key, class, bytes, shard, group and path
vitdist ls shards/train --class melanoma --json       # the same as JSON lines
vitdist cat shards/train 000000042 > picture.jpg      # by key, by row (#42) or by the path it was packed from
vitdist cat shards/train 000000042.cls                # another member than the picture
"""

import difflib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vitdist.data.index import IMAGES, SOURCE, Index


def rows(opened: Index, name: str | None = None, paths: bool = True) -> Iterator[dict[str, Any]]:
    """What `vitdist ls` tells of each sample, of the class `name` alone if given. Raises ValueError.

    `paths`: the path each picture was packed from, which lies in the shards: 12,000 samples/s with, 100,000 without.
    """
    if name is not None and name not in opened.classes:
        raise ValueError(f"{opened.folder}: no class {name!r}{_close(name, opened.classes)}")
    wanted = np.arange(len(opened)) if name is None else np.flatnonzero(opened.labels == opened.classes.index(name))
    groups = opened.groups()
    for row in wanted.tolist():
        key = opened.key(row)
        told = {
            "row": row,
            "key": key,
            "class": opened.classes[opened.labels[row]],
            "bytes": int(opened.columns["image_size"][row]),
            "shard": opened.shards[int(opened.shard_of(row))].name,
        }
        if groups:
            told["group"] = groups[row]
        if paths and (source := _source(opened, row)) != key:
            told["path"] = source
        yield told


def _source(opened: Index, row: int) -> str:
    try:
        return opened.source(row)
    except (OSError, ValueError) as error:
        return f"({error})"  # to list what is there, and what of it is broken, is what `ls` is for


def ls(folder: str | Path, *, name: str | None = None, paths: bool = True, as_json: bool = False) -> None:
    """Print a line for each sample."""
    for told in rows(Index.open(folder), name, paths):
        print(json.dumps(told, ensure_ascii=False) if as_json else line(told))
    sys.stdout.flush()


def line(told: dict[str, Any]) -> str:
    """Tab-separated: for cut, awk and sort."""
    cells = [told[name] for name in ("key", "class", "bytes", "shard")]
    # A name may hold tabs, or codes that a terminal obeys.
    return "\t".join(
        "".join(c if c.isprintable() else " " for c in str(cell))
        for cell in [*cells, *(told[name] for name in ("group", "path") if name in told)]
    )


def cat(folder: str | Path, key: str, out: str | Path | None = None) -> None:
    """Write a member of a sample, the picture if `key` names none, to stdout or into the file `out`.

    Raises ValueError for a sample or member that is not there, and for a picture that would go to a terminal.
    """
    opened = Index.open(folder)
    row, extension = find(opened, key)
    parts = opened.parts(row)
    extension = extension or next(e for e in parts if e in IMAGES)
    if extension not in parts:
        there = ", ".join(f".{e}" for e in parts)
        raise ValueError(f"{folder}: sample {opened.key(row)} has no .{extension}: it has {there}")
    content = parts[extension]
    if out is not None:
        Path(out).write_bytes(content)
        return
    if sys.stdout.isatty() and b"\0" in content:
        raise ValueError(f"a .{extension} is nothing to read on a terminal: add > FILE.{extension}, or -o FILE")
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


def find(opened: Index, wanted: str) -> tuple[int, str]:
    """Row and member ("": the picture) that `wanted` names: #ROW, KEY or the path packed from; each with .EXT.

    Paths lie in the shards: they are looked through last. Raises ValueError with names that are close.
    """
    if wanted.startswith("#"):
        number, _, extension = wanted[1:].partition(".")
        if not number.isdecimal() or int(number) >= len(opened):
            raise ValueError(f"{opened.folder}: no row {wanted}: rows are #0 to #{len(opened) - 1}")
        return int(number), extension.lower()
    keys = opened.keys()
    stem, _, extension = wanted.rpartition(".")
    # A key holds no dots behind its last slash, but an extension does: a.seg.png is seg.png of a.
    folder, slash, name = wanted.rpartition("/")
    short, _, long = name.partition(".")
    for key, member in ((wanted, ""), (stem, extension), (folder + slash + short, long)):
        if key in keys:
            return keys.index(key), member.lower()
    paths = [_source(opened, row) for row in range(len(opened))] if SOURCE in _members(opened) else []
    for path, member in ((wanted, ""), (stem, extension)):
        if path in paths:
            return paths.index(path), member.lower()
    raise ValueError(f"{opened.folder}: no sample {wanted!r}{_close(wanted, keys + paths)}")


def _members(opened: Index) -> list[str]:
    """Extensions in the first sample that is whole."""
    for row in range(len(opened)):
        try:
            return list(opened.parts(row))
        except (OSError, ValueError):
            continue
    return []


def _close(wanted: str, names: list[str]) -> str:
    # difflib is quadratic in the length of names: 20 us each
    found = difflib.get_close_matches(wanted, names[:100_000], 3, 0.6)
    return f": did you mean {', '.join(found)}?" if found else f": there is {', '.join(names[:3])} ..."
