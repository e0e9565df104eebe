"""Pictures whose bytes are no file's own: rows of a table, BMP and TIFF, and all under --resize.

    made.make(folder, work, pictures)       # a batch a process; goes on where it stopped
    content = made.read(folder, picture)

    FOLDER/000012        the made files of a batch back to back
    FOLDER/000012.npy    bytes and pages of each, written last

They are made before the shards are cut, so that the size of every shard is known before it is begun, a table is
read once from front to back and yet shuffled, and little is in memory. The price is their bytes on the disk a
second time while `vitdist pack` runs.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitdist import rundir
from vitdist.data import parallel, tables
from vitdist.data.files import Picture, naming
from vitdist.data.recode import CONVERTED, Recipe, pages, recode
from vitdist.data.tables import Table

# What one process makes before it is kept: some seconds of work.
_FILES, _BYTES = 256, 64 << 20
_ROW = np.dtype([("bytes", "<u8"), ("pages", "<u4")])


class NotPictures(ValueError):
    """The message names them."""


class _Batch(NamedTuple):
    """Pictures that one process makes, in this order."""

    path: Path
    pictures: list[tuple[Path, Picture]]
    """With the folder that a picture's path starts from."""
    recipe: Recipe
    table: Table | None
    column: str
    span: tuple[int, int]
    """Rows of `table`, the last not included."""


class Source(NamedTuple):
    recipe: Recipe
    stores: list[Table]
    column: str


def is_made(picture: Picture, recipe: Recipe) -> bool:
    extension = os.path.splitext(picture.source)[1][1:].lower().decode(errors="replace")
    return picture.store >= 0 or not recipe.keeps_bytes or extension in CONVERTED


def make(
    folder: Path, source: Source, parts: Sequence[tuple[Path, list[Picture]]], workers: int | None, progress: bool
) -> tuple[list[list[Picture]], int]:
    """Make what is to be made of the pictures of each (root, pictures).

    Returns the pictures anew, and how many had pages that were left out. A made one has its true `bytes`; `store`
    is the number of its batch and `at` its first byte there. Raises NotPictures.
    """
    wanted = [
        (root, picture, (part, place))
        for part, (root, pictures) in enumerate(parts)
        for place, picture in enumerate(pictures)
        if is_made(picture, source.recipe)
    ]
    results = [list(pictures) for _, pictures in parts]
    if not wanted:
        return results, 0
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(".*"):
        path.unlink()  # left by a pack that was killed
    batches = list(_batches(folder, source, [(root, picture) for root, picture, _ in wanted]))
    todo = [batch for batch in batches if not _rows(batch.path).exists()]
    total = sum(len(batch.pictures) for batch in todo)
    refuse(parallel.each(_make, todo, "reading", unit="pictures", total=total, workers=workers, progress=progress))
    places = {(os.fspath(root), picture.source): place for root, picture, place in wanted}
    paged = 0
    for number, batch in enumerate(batches):
        rows, start = np.load(_rows(batch.path)), 0
        paged += int((rows["pages"] > 1).sum())
        for (root, picture), size in zip(batch.pictures, rows["bytes"].tolist(), strict=True):
            part, place = places[os.fspath(root), picture.source]
            results[part][place] = picture._replace(bytes=size, store=number, at=start)
            start += size
    return results, paged


def read(folder: Path, picture: Picture) -> bytes:
    """The file of a picture that `make` returned, which was made."""
    with open(folder / _name(picture.store), "rb") as file:
        return os.pread(file.fileno(), picture.bytes, picture.at)


def refuse(results: Iterable[object]) -> None:
    """Raises NotPictures for the faults among the results, which are lists of texts."""
    faults = sorted(fault for result in results if isinstance(result, list) for fault in result)
    if faults:
        named = "; ".join(faults[:5]) + (f" and {len(faults) - 5:,} more" if len(faults) > 5 else "")
        raise NotPictures(f"not pictures: {named}: remove or replace them, then pack again")


def original(root: Path, picture: Picture) -> bytes:
    """Its file's bytes. Raises ValueError if they are not those that were listed."""
    path = root / os.fsdecode(picture.source)
    with naming(path):
        content = path.read_bytes()
    if len(content) != picture.bytes:
        raise ValueError(f"{path} (changed while it was packed)")
    return content


def _name(number: int) -> str:
    return f"{number:06d}"


def _rows(path: Path) -> Path:
    return path.with_suffix(".npy")


def _batches(folder: Path, source: Source, wanted: list[tuple[Path, Picture]]) -> Iterator[_Batch]:
    number = 0
    files = [item for item in wanted if item[1].store < 0]
    for start in range(0, len(files), _FILES):
        yield _Batch(folder / _name(number), files[start : start + _FILES], source.recipe, None, "", (0, 0))
        number += 1
    in_rows: dict[int, list[tuple[Path, Picture]]] = {}
    for item in wanted:
        if item[1].store >= 0:
            in_rows.setdefault(item[1].store, []).append(item)
    for store, items in sorted(in_rows.items()):
        items.sort(key=lambda item: item[1].at)
        at = 0
        for span in tables.spans(source.stores[store], _BYTES):
            first = at
            while at < len(items) and items[at][1].at < span[1]:
                at += 1
            if at > first:
                path = folder / _name(number)
                yield _Batch(path, items[first:at], source.recipe, source.stores[store], source.column, span)
                number += 1


def _make(batch: _Batch) -> list[str]:
    """Make one batch. Returns what is wrong with its pictures; then it is not kept."""
    faults, rows = [], []
    contents = _in_rows(batch) if batch.table else _in_files(batch)
    try:
        with rundir.appearing(batch.path) as file:
            for where, content in contents:
                try:
                    if isinstance(content, ValueError):
                        raise content
                    made = recode(content, batch.recipe)[1]
                    rows.append((len(made), pages(content)))
                    file.write(made)
                except ValueError as error:
                    faults.append(str(error) if isinstance(content, ValueError) else f"{where} ({error})")
                parallel.advance()
            if faults:
                raise NotPictures
    except NotPictures:
        return faults
    with rundir.appearing(_rows(batch.path)) as file:
        np.save(file, np.array(rows, _ROW))
    return []


def _in_files(batch: _Batch) -> Iterator[tuple[str, bytes | ValueError]]:
    for root, picture in batch.pictures:
        where = os.fspath(root / os.fsdecode(picture.source))
        try:
            yield where, original(root, picture)
        except ValueError as error:
            yield where, error


def _in_rows(batch: _Batch) -> Iterator[tuple[str, bytes | ValueError]]:
    assert batch.table
    wanted = {picture.at for _, picture in batch.pictures}
    payloads = tables.payloads(batch.table, batch.column, *batch.span)
    for at, content in enumerate(payloads, batch.span[0]):
        if at in wanted:
            where = batch.table.row(at)
            missing = ValueError(f"{where} (no bytes in column {batch.column!r})")
            yield where, missing if content is None else content
