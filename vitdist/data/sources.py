"""What there is to pack: a folder or a table -> the pictures of each split, with label and group. Reads no picture.

data = sources.read("ham10000/metadata.csv", Options(label_column="dx", group_by="lesion_id"))

SRC/CLASS/**.jpg                        an ImageFolder; also SRC/train/CLASS, SRC/val/CLASS, SRC/test/CLASS
SRC.csv, .tsv, .jsonl, .parquet         a table with a column of paths and one of labels
SRC/[SPLIT/]metadata.csv|jsonl|parquet  with a column file_name: an `imagefolder` of `datasets`
SRC/[data/]train-*.parquet              with pictures in the rows: a data set as it lies on the Hub
SRC/dataset_dict.json, state.json       what `save_to_disk` of `datasets` leaves
"""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vitdist.data import tables
from vitdist.data.files import (
    PICTURES,
    SHOW_EVERY,
    Finder,
    Picture,
    Show,
    extension,
    identity,
    naming,
    refuse_dead_link,
    walk,
)
from vitdist.data.tables import Table

_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in _SPLITS.items() for name in names}
# Usual names of columns. A name of a later tuple counts only if the table has none of those before it.
_IMAGE = (
    ("file_name", "filename", "file", "path", "filepath", "file_path", "image_path", "img_path", "image", "img"),
    ("image_id", "img_id", "imageid", "image_name", "id"),
)
_LABEL = (("label", "labels", "class", "class_name", "target", "category", "dx", "diagnosis"),)
_SPLIT = (("split", "fold", "set", "subset", "partition"),)
_NONE = "none"
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Options:
    """How to read a source. Without a name, a column is found by those that are usual."""

    root: str | Path | None = None
    """Folder that the paths of a table start from; without it the table's own."""
    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    """'none': there is one, but it is not to be used."""
    classes: str | Path | None = None
    """Text file with one class name a line, in the order of the labels."""
    group_by: str | None = None
    """A column, or 'name:REGEX', whose first capture group is taken from the path below the source."""


@dataclass(frozen=True)
class Part:
    root: Path
    pictures: list[Picture]
    name: str
    """How the source calls it."""
    by_column: bool = False


@dataclass(frozen=True)
class DataSet:
    classes: list[str]
    parts: dict[str, Part]
    """Of train, val and test those that the source tells apart; train always."""
    stores: list[Table]
    column: str
    """Of the pictures in `stores`."""
    grouped: bool
    notes: list[str]
    """What to tell the user."""


def read(source: str | Path, options: Options | None = None, show: Show = lambda found: None) -> DataSet:
    """List `source`. `show` is told now and then how many pictures were found.

    Raises ValueError in one line for what is no data set: nothing to pack, a single class, labels that are
    missing, out of range or unknown to training, a picture named twice or not there, links in a circle, a
    group on both sides of a given split.
    """
    source, options = Path(source), options or Options()
    if source.is_dir():
        listings = _listings(source)
    elif source.exists():
        listings = [_Listing(None, source.parent, tables.read_header(source))]
    else:
        raise ValueError(f"{source}: no such folder of pictures, and no such table")
    found = _Found(source, listings)
    (_read_tables if listings else _read_folder)(found, options, show)
    classes = _number(found, list(read_classes(options.classes)) if options.classes else None)
    if len(classes) < 2:
        raise ValueError(
            f"{source}: a single class, {classes[0]!r}: "
            + ("give a column with more, --label-column" if listings else "put each class into a folder of its own")
        )
    for name in classes:
        if "\n" in name or not name.isprintable():
            raise ValueError(f"{source}: a class called {name!r}: rename it in one line of readable text")
    if options.group_by:
        _check_groups(found)
    parts = {split: found.parts[split] for split in _SPLITS if split in found.parts}
    return DataSet(classes, parts, found.stores, found.column, bool(options.group_by), found.notes)


class _Listing(NamedTuple):
    split: str | None
    """The source's name for it; None if a column tells, or nothing does."""
    root: Path
    table: Table


@dataclass
class _Found:
    """What was found so far. Labels are numbers of `labels`, by first sight, until `_number`."""

    source: Path
    listings: list[_Listing]
    parts: dict[str, Part] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    known: list[str] | None = None
    """Class names in their order, where the source has them."""
    stores: list[Table] = field(default_factory=list)
    column: str = ""
    notes: list[str] = field(default_factory=list)

    def label(self, text: str) -> int:
        return self.labels.setdefault(text, len(self.labels))

    def where(self, split: str, picture: Picture) -> str:
        """How a person finds it."""
        if picture.store >= 0:
            return self.stores[picture.store].row(picture.at)
        of_split = [listing.table for listing in self.listings if _split_of(listing.split or split) == split]
        if len(of_split) == 1:
            return of_split[0].row(picture.at)
        return str(self.parts[split].root / os.fsdecode(picture.source))


def read_classes(path: str | Path) -> list[str]:
    """One class name a line. Raises ValueError for a file without names or with one twice."""
    names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if not names or twice:
        raise ValueError(f"{path}: " + (f"the class {twice[0]!r} stands there twice" if twice else "no class names"))
    return names


# ---- labels, splits and groups --------------------------------------------------------------------


def _doubtful(found: _Found, classes: list[str], pictures: int) -> None:
    """Note what is no mistake by itself but often is one."""
    by_folded: dict[str, list[str]] = {}
    for name in classes:
        by_folded.setdefault(name.casefold().strip(), []).append(name)
    twins = next((names for names in by_folded.values() if len(names) > 1), None)
    if twins:
        found.notes.append(f"warning: the classes {' and '.join(map(repr, twins))} differ in their spelling alone")
    if len(classes) > max(20, pictures / 2):
        found.notes.append(f"warning: {len(classes):,} classes for {pictures:,} pictures: is this column the class?")


def _number(found: _Found, given: list[str] | None) -> list[str]:
    """Class names; gives every picture its class number in their order."""
    train = found.parts["train"].pictures
    texts = list(found.labels)
    trained = {texts[label] for label in {picture.label for picture in train}}
    numbers = not found.known and all(_INTEGER.fullmatch(text) for text in texts)
    if given and numbers and not trained <= set(given):
        classes, number = given, {text: int(text) for text in texts}
    elif given:
        classes, number = given, {name: i for i, name in enumerate(given)}
    elif numbers:
        number = {text: int(text) for text in texts}
        there = {number[text] for text in trained}
        gap = next(i for i in itertools.count() if i not in there)
        if gap < max(there) and min(there) >= 0:
            raise ValueError(
                f"{found.source}: labels up to {max(there)}, but no training picture has {gap}: count from 0 "
                "without gaps, or give --classes FILE with the labels as names, one a line"
            )
        classes = [f"class {i}" for i in range(max(gap, 1))]
    else:
        classes = [name for name in found.known or sorted(trained) if name in trained]
        number = {name: i for i, name in enumerate(classes)}
    _doubtful(found, classes, len(train))
    of_label = [number.get(text, -1) for text in texts]
    for split, part in found.parts.items():
        for at, picture in enumerate(part.pictures):
            new = of_label[picture.label]
            text = texts[picture.label]
            if not 0 <= new < len(classes) or text not in trained:
                raise ValueError(_no_class(found.where(split, picture), text, split, number, classes, given))
            part.pictures[at] = picture._replace(label=new)
    empty = set(range(len(classes))) - {picture.label for picture in train}
    if empty:
        found.notes.append(f"no training picture of {len(empty)} classes, such as {classes[min(empty)]!r}")
    return classes


def _no_class(
    where: str, text: str, split: str, number: dict[str, int], classes: list[str], given: list[str] | None
) -> str:
    if text in number and number[text] < 0:
        return f"{where}: the label {text}: class numbers start at 0; correct it or remove the row"
    if given and text not in number:
        return f"{where}: the class {text!r} is not in --classes: add it there, or correct the label"
    if given and number[text] >= len(classes):
        return f"{where}: the label {text} is out of range: --classes names {len(classes)}, 0 to {len(classes) - 1}"
    return f"{where}: the class {text!r} is in {split}, but no training picture has it: add some, or remove it"


def _split_of(name: str) -> str | None:
    return _SPLIT_OF.get(name.lower())


def _check_groups(found: _Found) -> None:
    first: dict[str, str] = {}
    shared: dict[str, tuple[str, str]] = {}
    for split, part in found.parts.items():
        for picture in part.pictures:
            if first.setdefault(picture.group, split) != split:
                shared[picture.group] = first[picture.group], split
    if shared:
        group, (one, other) = min(shared.items())
        more = f" and {len(shared) - 1:,} more" if len(shared) > 1 else ""
        raise ValueError(
            f"{found.source}: group {group!r} is in {one} and in {other}{more}: sort each into one split"
            + (f", or split anew with --split-column {_NONE} --val-fraction 0.1" if found.listings else "")
        )


def _group_by_name(group_by: str | None) -> Callable[[str], str] | None:
    """For 'name:REGEX' what takes the group from a path."""
    if not group_by or not group_by.startswith("name:"):
        return None
    try:
        pattern = re.compile(group_by.removeprefix("name:"))
    except re.error as error:
        raise ValueError(f"--group-by {group_by}: no regular expression ({error})") from None
    if not pattern.groups:
        raise ValueError(rf"--group-by {group_by}: mark the group with parentheses, as in 'name:(patient\d+)'")

    def group(path: str) -> str:
        match = pattern.search(path)
        if not match or not match[1]:
            raise ValueError(f"{path}: --group-by {group_by} finds no group in this path")
        return match[1]

    return group


# ---- folders of class folders ---------------------------------------------------------------------


def _read_folder(found: _Found, options: Options, show: Show) -> None:
    """An ImageFolder. Raises ValueError for class folders that do not fit those of training."""
    source, group = found.source, _group_by_name(options.group_by)
    for value in (options.root, options.image_column, options.label_column, options.split_column):
        if value is not None:
            raise ValueError(f"{source} is a folder of class folders, not a table: it has no use for {value!r}")
    if options.group_by and not group:
        raise ValueError(
            f"{source} is a folder of class folders, without columns: --group-by takes the group from the "
            r"path, as in --group-by 'name:(patient\d+)'"
        )
    given = _given_splits(source)
    root = given.get("train", source)
    found.known = _folders(root)
    loose = [p for p in sorted(root.iterdir()) if extension(p.name) in PICTURES and not p.name.startswith(".")]
    if loose and not found.known:
        raise ValueError(f"{loose[0]}: a picture in no class folder: make one a class, or pack a table of their labels")
    ignored = [str(path) for path in loose]
    for split, folder in (given or {"train": source}).items():
        pictures = []
        for picture in _in_classes(folder, found, ignored):
            if group:
                below = os.path.relpath(folder / os.fsdecode(picture.source), source)
                picture = picture._replace(group=group(below))
            pictures.append(picture)
            if len(pictures) % SHOW_EVERY == 0:
                show(len(pictures))
        if not pictures:
            raise ValueError(f"{folder}: no pictures ({', '.join(PICTURES)}) in folders named by their class")
        found.parts[split] = Part(folder, pictures, f"{folder.name}/")
        empty = set(found.known) - found.labels.keys()
        if empty:
            raise ValueError(
                f"{root / min(empty)}: a class without pictures ({', '.join(PICTURES)}): remove or fill it"
            )
    if ignored:
        found.notes.append(
            f"left out {len(ignored):,} files that are no {', '.join(PICTURES)} in a class folder, such as {ignored[0]}"
        )


def _given_splits(source: Path) -> dict[str, Path]:
    """Split -> folder if `source` is laid out as train/CLASS, val/CLASS; empty if its folders are classes."""
    folders = _folders(source)
    named = {split: [name for name in folders if name.lower() in names] for split, names in _SPLITS.items()}
    if not named["train"] or not _folders(source / named["train"][0]):
        return {}
    others = [name for name in folders if _SPLIT_OF.get(name.lower()) is None]
    classes = set(_folders(source / named["train"][0]))
    odd = [name for name in others if (inside := _folders(source / name)) and set(inside) <= classes]
    if odd:
        raise ValueError(
            f"{source}: {odd[0]}/ holds folders of the same names as {named['train'][0]}/: is it a split? Name it "
            "train, val or test, or move it elsewhere"
        )
    if not (named["val"] or named["test"] or not others):
        return {}
    for names in named.values():
        if len(names) > 1:
            raise ValueError(f"{source}: both {names[0]}/ and {names[1]}/: leave one")
    return {split: source / names[0] for split, names in named.items() if names}


def _folders(folder: Path) -> list[str]:
    """Raises ValueError for a link that leads nowhere: it may have been one. __MACOSX: macOS, in its archives."""
    inside = sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name != "__MACOSX")
    for path in inside:
        refuse_dead_link(path)
    return [path.name for path in inside if path.is_dir()]


def _in_classes(folder: Path, found: _Found, ignored: list[str]) -> Iterator[Picture]:
    top = frozenset([identity(folder)])
    below = len(os.path.join(folder, ""))
    for name in _folders(folder):
        if name not in (found.known or ()):
            raise ValueError(f"{folder / name}: a class that the training pictures do not have")
        for entry in walk(os.path.join(folder, name), top):
            if extension(entry.name) not in PICTURES:
                ignored.append(entry.path)
                continue
            with naming(entry.path):
                status = entry.stat()
            source = os.fsencode(entry.path[below:])
            yield Picture(source, found.label(name), status.st_size, status.st_mtime_ns)


# ---- tables ---------------------------------------------------------------------------------------


def _listings(folder: Path) -> list[_Listing]:
    """The tables of a folder as `datasets` writes it; none if it is a plain folder of pictures."""
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return [listing for split in splits for listing in _saved(split, folder / split)]
    if (folder / "state.json").exists():
        return _saved(None, folder)
    inside = [(name, folder / name) for name in _folders(folder) if _split_of(name)]
    for places in ([(None, folder)], inside):
        found = [_Listing(split, path, table) for split, path in places for table in _metadata(path)]
        if found:
            return found
    for places in ([(None, folder)], [(None, folder / "data")], inside):
        files = [(split, file) for split, path in places for file in sorted(path.glob("*.parquet"))]
        if files:
            _all_parts(files)
            return [
                _Listing(split or _split_in(file.name), file.parent, tables.read_header(file)) for split, file in files
            ]
    return []


def _all_parts(files: list[tuple[str | None, Path]]) -> None:
    """train-00000-of-00004.parquet says how many belong to it. Raises ValueError for a part that is not there."""
    for _, file in files:
        match = re.fullmatch(r"(.*)-(\d+)-of-(\d+)(\.parquet)", file.name)
        for number in range(int(match[3]) if match else 0):
            assert match
            part = f"{match[1]}-{number:0{len(match[2])}}-of-{match[3]}{match[4]}"
            if not (file.parent / part).exists():
                raise ValueError(f"{file.parent / part}: this part of the data set is not there: bring it too")


def _saved(split: str | None, folder: Path) -> list[_Listing]:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [_Listing(split, folder, tables.read_header(folder / e["filename"])) for e in state["_data_files"]]


def _metadata(folder: Path) -> list[Table]:
    for name in ("metadata.csv", "metadata.jsonl", "metadata.parquet"):
        if (folder / name).is_file() and "file_name" in (table := tables.read_header(folder / name)).columns:
            return [table]
    return []


def _split_in(name: str) -> str | None:
    """train-00000-of-00004.parquet -> train"""
    first = re.split(r"[-_.]", name)[0]
    return first if _split_of(first) else None


class _Columns(NamedTuple):
    image: str
    label: str
    split: str | None
    group: str | None
    """None also for 'name:REGEX'."""


def _columns(table: Table, options: Options, split_by_name: bool) -> _Columns:
    """Raises ValueError, listing the columns there are, where one is lacking or several could be meant."""
    image = options.image_column
    if not image and table.holding:
        held = [name for name in table.holding if name.lower() in _IMAGE[0]] or list(table.holding)
        image = _only(table, held, "the pictures", "--image-column")
    image = image or _usual(table, _IMAGE, "the pictures' paths", "--image-column")
    label = options.label_column or _usual(
        table, (tuple(table.names), *_LABEL) if table.names else _LABEL, "the labels", "--label-column"
    )
    split = options.split_column
    if split == _NONE or split_by_name:
        split = None
    elif not split and any(name.lower() in _SPLIT[0] for name in table.columns):
        split = _usual(table, _SPLIT, "the split", "--split-column")
    group = None if _group_by_name(options.group_by) else options.group_by
    for name in (image, label, split, group):
        if name and name not in table.columns:
            raise ValueError(f"{table.path} has no column {name!r}, but {', '.join(table.columns)}")
    return _Columns(image or "", label or "", split, group)


def _usual(table: Table, tiers: Iterable[tuple[str, ...]], what: str, option: str) -> str:
    for tier in tiers:
        named = [name for name in table.columns if name.lower() in tier or name in tier]
        if named:
            return _only(table, named, what, option)
    raise ValueError(f"{table.path}: which column has {what}? Say so with {option}: {', '.join(table.columns)}")


def _only(table: Table, named: list[str], what: str, option: str) -> str:
    if len(named) > 1:
        raise ValueError(f"{table.path}: {what} could be in {' or '.join(map(repr, named))}: say which with {option}")
    return named[0]


def _read_tables(found: _Found, options: Options, show: Show) -> None:
    first = found.listings[0].table
    columns = _columns(first, options, found.listings[0].split is not None)
    by_name = _group_by_name(options.group_by)
    found.known = first.names.get(columns.label)
    found.column = columns.image
    files = Finder(options.root, show)
    for listing in found.listings:
        table = listing.table
        lacking = [name for name in columns if name and name not in table.columns]
        if lacking:
            raise ValueError(f"{table.path} has no column {lacking[0]!r}, which {first.path} has")
        texts = _texts(table, columns)
        labels = _labels(found, listing, texts[columns.label], columns.label)
        if not labels:
            continue
        groups: list[str | None] = texts[columns.group] if columns.group else [""] * len(labels)
        tables.complete(table, groups, f"group in column {columns.group!r}", "fill it in, or remove the rows")
        splits = _split_column(table, texts, columns, listing.split or "train")
        if columns.image in table.holding:
            places = _in_rows(found, table, columns.image)
            root = table.path.parent
        else:
            root = Path(options.root or listing.root)
            places = files.find(table, root, texts[columns.image], columns.image)
        for at, (place, label, group, split) in enumerate(zip(places, labels, groups, splits, strict=True)):
            if by_name:
                group = by_name(os.fsdecode(place.source))
            part = found.parts.get(split)
            if part is None:
                name = f"{split} in column {columns.split!r}" if columns.split else f"{listing.split or 'train'}"
                part = found.parts[split] = Part(root, [], name, columns.split is not None)
            part.pictures.append(place._replace(label=found.label(label), group=group or "", at=at))
    if "train" not in found.parts:
        raise ValueError(f"{found.source}: no training pictures, only {' and '.join(found.parts) or 'none at all'}")


def _texts(table: Table, columns: _Columns) -> dict[str, list[str | None]]:
    wanted = dict.fromkeys(name for name in columns if name and name not in table.holding)
    texts = tables.texts(table, list(wanted))
    if not texts[columns.label]:
        raise ValueError(f"{table.path}: no rows")
    return texts


def _labels(found: _Found, listing: _Listing, texts: list[str | None], column: str) -> list[str]:
    """Labels as text, those of a ClassLabel by name. None for a test set that `datasets` keeps without labels."""
    names = listing.table.names.get(column)
    if names and _split_of(listing.split or "") == "test" and set(texts) <= {"-1", None}:
        found.notes.append(f"left out {listing.table.path}: a test set without labels")
        return []
    tables.complete(listing.table, texts, f"label in column {column!r}", "fill it in, or remove the rows")
    if not names:
        return [text for text in texts if text is not None]
    named = []
    for at, text in enumerate(texts):
        if text is None or not _INTEGER.fullmatch(text) or not 0 <= int(text) < len(names):
            where = listing.table.row(at)
            raise ValueError(f"{where}: the label {text} is out of range: {column!r} has 0 to {len(names) - 1}")
        named.append(names[int(text)])
    return named


def _split_column(table: Table, texts: dict[str, list[str | None]], columns: _Columns, otherwise: str) -> list[str]:
    """train, val or test for each row."""
    if not columns.split:
        return [_split_of(otherwise) or "train"] * len(texts[columns.label])
    values = texts[columns.split]
    tables.complete(table, values, f"split in column {columns.split!r}", f"fill it in, or use --split-column {_NONE}")
    splits = {value: _split_of(value) for value in values if value}
    for value, split in splits.items():
        if split is None:
            raise ValueError(
                f"{table.row(values.index(value))}: the split {value!r} in column {columns.split!r} is none of train, "
                f"val, test: correct it, or use --split-column {_NONE}"
            )
    return [splits[value] or "" for value in values if value]


def _in_rows(found: _Found, table: Table, column: str) -> Iterator[Picture]:
    """Pictures that lie in the rows of a table."""
    store = len(found.stores)
    found.stores.append(table)
    base = found.source if found.source.is_dir() else found.source.parent
    below = os.fsencode(os.path.relpath(table.path, base))
    changed = table.path.stat().st_mtime_ns
    for at, name in enumerate(tables.picture_names(table, column)):
        end = b"/" + os.fsencode(os.path.basename(name)) if name else b""
        yield Picture(b"%s/%d%s" % (below, at, end), -1, 0, changed, store=store)
