"""Pictures in files: what lies in a folder, and where the pictures are that a table names. Reads no picture.

for entry in files.walk("photos/cat"): ...
for picture in files.Finder(root=None).find(table, Path("ham10000"), ["ISIC_0024306", ...], "image_id"): ...
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from vitdist.data import tables
from vitdist.data.index import IMAGES
from vitdist.data.recode import CONVERTED
from vitdist.data.tables import Table

PICTURES = (*IMAGES, *CONVERTED)
"""Extensions of what can be packed."""

SHOW_EVERY = 1000

Show = Callable[[int], None]
"""Is told how many pictures were found, every SHOW_EVERY."""


class Picture(NamedTuple):
    """Some 300 bytes of memory: an ImageNet takes 0.4 GB."""

    source: bytes
    """Path below the part's root, as the file system spells it; of a picture in a row FILE/ROW/NAME."""
    label: int
    bytes: int
    """0 where the picture lies in a row."""
    changed: int
    """Modification time of its file, ns."""
    group: str = ""
    store: int = -1
    """Number of the table whose row `at` holds the picture; -1 for a file of its own."""
    at: int = -1
    """Row in its table, also of a picture that only has its path there."""


def extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[os.DirEntry[str]]:
    """The files in `folder`, hidden ones left out: .DS_Store, and the ._NAME.jpg that macOS leaves in archives.

    Links are followed. Raises ValueError for one that leads back to a folder above it, or nowhere.
    """
    with naming(folder):
        here = identity(folder)
        if here in above:
            raise ValueError(f"{folder}: a link back to a folder that it lies in: remove the link")
        with os.scandir(folder) as entries:
            inside = sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    for entry in inside:
        if entry.is_dir():
            yield from walk(entry.path, above | {here})
        else:
            if entry.is_symlink():
                refuse_dead_link(entry.path)
            if not entry.is_file():  # to open a pipe waits for its other end
                raise ValueError(f"{entry.path}: is no file but a pipe, socket or device: remove it")
            yield entry


def refuse_dead_link(path: str | Path) -> None:
    if os.path.islink(path) and not os.path.exists(path):
        raise ValueError(f"{path}: a link to {os.readlink(path)}, which is not there: mend or remove it")


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


class Finder:
    """Finds the pictures that tables name by path or, without an extension, by stem."""

    def __init__(self, root: str | Path | None, show: Show) -> None:
        self.root, self.show = root, show
        self.taken: dict[str, tuple[Table, int]] = {}
        self.stems: dict[Path, dict[str, list[str]]] = {}

    def find(self, table: Table, root: Path, names: list[str | None], column: str) -> Iterator[Picture]:
        """Raises ValueError for rows without a path, and paths that lead nowhere, to several, or come twice."""
        tables.complete(table, names, f"path in column {column!r}", "fill it in, or remove the rows")
        if not root.is_dir():
            raise ValueError(f"--root {root}: no such folder")
        base = os.fspath(root)
        missing: list[int] = []
        for at, name in enumerate(names):
            path = self._path(table, root, at, name or "")
            try:
                status = os.stat(os.path.join(base, path))
            except (FileNotFoundError, NotADirectoryError):
                missing.append(at)
                continue
            except OSError as error:
                raise ValueError(f"{table.row(at)}: {path} cannot be read ({error.strerror})") from None
            full = os.path.join(base, path)
            first = self.taken.setdefault(full, (table, at))
            if first != (table, at):
                raise ValueError(f"{table.row(at)} names {path} again, after {first[0].row(first[1])}: keep one row")
            if at % SHOW_EVERY == 0:
                self.show(at)
            if not missing:
                yield Picture(os.fsencode(path), -1, status.st_size, status.st_mtime_ns)
        if missing:
            raise ValueError(self._missing(table, root, names, missing))

    def _path(self, table: Table, root: Path, at: int, name: str) -> str:
        """Below `root`, as the file system has it."""
        if "\\" in name and not (root / name).exists():
            name = name.replace("\\", "/")  # written on Windows
        if extension(name) in PICTURES:
            return os.path.normpath(name)
        found = [path for path in self._by_stem(root).get(os.path.basename(name), []) if _ends(path, name)]
        if len(found) > 1:
            raise ValueError(
                f"{table.row(at)}: {name!r} is both {found[0]} and {found[1]}: write its path, or use --root"
            )
        return found[0] if found else os.path.normpath(name) + ".*"

    def _by_stem(self, root: Path) -> dict[str, list[str]]:
        if root not in self.stems:
            stems = self.stems[root] = {}
            below = len(os.path.join(root, ""))
            for entry in walk(os.fspath(root), frozenset()):
                if extension(entry.name) in PICTURES:
                    stems.setdefault(os.path.splitext(entry.name)[0], []).append(entry.path[below:])
        return self.stems[root]

    def _missing(self, table: Table, root: Path, names: list[str | None], missing: list[int]) -> str:
        at, name = missing[0], names[missing[0]] or ""
        more = f", and {len(missing) - 1:,} more are missing" if len(missing) > 1 else ""
        elsewhere = [
            path
            for path in self._by_stem(root).get(os.path.splitext(os.path.basename(name))[0], [])
            if path.endswith(name)
        ]
        way_out = "give the folder that the paths start from with --root"
        if elsewhere:
            way_out = f"there is {elsewhere[0]}: use --root {root / elsewhere[0][: -len(name)]}"
        return f"{table.row(at)}: no picture {name} in {root}{more}: {way_out}"


def _ends(path: str, stem: str) -> bool:
    return f"/{os.path.splitext(path)[0]}".endswith(f"/{stem}")
