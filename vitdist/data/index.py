"""Index of a folder of WebDataset shards: where each sample lies, its label, its checksum. Imports no torch.

    vitdist index FOLDER                                       # KEY.jpg|jpeg|png|webp and KEY.cls
    vitdist index FOLDER --label json:label                    # the label in a field of KEY.json
    vitdist index 'https://host/train/{0000..0099}.tar' --out FOLDER     # shards that lie elsewhere

    FOLDER/*.tar          members KEY.jpg|jpeg|png|webp and KEY.cls|txt|json, by anyone's tools
    FOLDER/classes.txt    optional: one class name a line
    FOLDER/index.json     version, digest, classes, counts; of each shard name, bytes, samples, sha256
    FOLDER/index.arrow    one row a sample, in the order of the shards; Arrow IPC, memory-mapped
    FOLDER/.index/        the same for each shard alone, so that indexing goes on where it stopped

pandas, polars and duckdb open index.arrow too. A header's checksum is verified here, once (tar.py), and every
sample gets a CRC-32 of all its bytes, label included: what changes later is found when it is read.
"""

import glob
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32  # zlib's CRC-32 at 4 times its speed: 9 against 2.3 GB/s on one core

from vitdist import rundir
from vitdist.data import parallel, storage, tar
from vitdist.data.storage import Cache, Place, Storage
from vitdist.data.tar import Part

if TYPE_CHECKING:
    import pyarrow

VERSION = 2
IMAGES = ("jpg", "jpeg", "png", "webp")
LABEL = "cls"
SOURCE = "path"
"""Member in which `vitdist pack` keeps the picture's path in the folder that it was packed from."""
GROUP = "group"
"""Member with the name of the patient, lesion or part that several pictures show."""

COLUMNS = {
    "offset": "<u8",  # of the sample's first header in the shard, PAX and GNU extensions included
    "size": "<u4",  # bytes from there to the end of the sample's last member
    "image_offset": "<u4",  # of the picture's bytes, counted from `offset`
    "image_size": "<u4",
    "label": "<i4",
    "crc32": "<u4",  # of the `size` bytes
}
"""Numbers of index.arrow; beside them `key` and, where shards have it, `group`, as text."""

_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_APART = "members of a sample must lie side by side: tar --sort=name"
_INTEGER = re.compile(r"\s*[-+]?[0-9]+\s*")


class Shard(NamedTuple):
    name: str
    bytes: int
    samples: int
    sha256: str


class Scan(NamedTuple):
    """One shard, read whole."""

    shard: Shard
    columns: dict[str, np.ndarray]
    """COLUMNS without `label`."""
    labels: list[str]
    """As they stand in the shard: numbers or names. `write` makes class numbers of them."""
    keys: list[str]
    groups: list[str]
    """Empty text where a sample has none."""


@dataclass(frozen=True)
class Index:
    """An opened set of shards. `len(index)` is the number of samples."""

    folder: str
    """Where the index lies: a folder or a URL."""
    classes: list[str]
    shards: list[Shard]
    places: list[Place]
    """Where each shard lies."""
    counts: list[int]
    """Samples of each class."""
    digest: str
    """SHA-256 over version, classes, shard hashes and labels: the identity of the data set, wherever it lies."""
    columns: dict[str, np.ndarray]
    """COLUMNS, each [samples], memory-mapped, read-only."""
    starts: np.ndarray
    """int64 [shards + 1]: first row of each shard, and the number of samples."""
    cache: Cache | None
    _table: "pyarrow.Table"

    @classmethod
    def open(cls, folder: str | Path, cache: Cache | None = None, check: bool = True) -> "Index":
        """Open a folder or URL. Raises ValueError, in one line with the way out, for whatever is not as indexed.

        Shards are looked at where that costs little, in a local folder: there, sizes and names must fit, unless
        `check` is off and only the index itself matters.
        """
        record = read_record(folder)
        shards = [Shard(**shard) for shard in record["shards"]]
        base = record.get("base") or str(folder)
        places = [Place(_join(base, shard.name), shard.bytes, shard.sha256) for shard in shards]
        if check and storage.is_remote(base):
            _check_server(places)
        elif check:
            _check_files(Path(folder), Path(base), shards)
        starts = np.concatenate([[0], np.cumsum([shard.samples for shard in shards])])
        table = _open_table(str(folder), record, int(starts[-1]))
        columns = {name: table.column(name).chunk(0).to_numpy(zero_copy_only=True) for name in COLUMNS}
        return cls(
            str(folder), record["classes"], shards, places, record["counts"], record["digest"], columns, starts,
            cache, table,
        )  # fmt: skip

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def labels(self) -> np.ndarray:
        """int32 [samples]"""
        return self.columns["label"]

    @cached_property
    def storage(self) -> Storage:
        return Storage(self.places, self.cache)

    def shard_of(self, rows: Any) -> np.ndarray:
        """Number of the shard that holds each of `rows`, int64 of the same shape."""
        return np.searchsorted(self.starts, rows, "right") - 1

    def span(self, i: int) -> tuple[int, int, int]:
        """Shard, first byte and number of bytes of all members of sample `i`."""
        return int(self.shard_of(i)), int(self.columns["offset"][i]), int(self.columns["size"][i])

    def read(self, i: int) -> bytes:
        """The bytes of all members of sample `i`. Raises ValueError if they are not those indexed, and OSError."""
        content = self.storage.read(*self.span(i))
        if crc32(content) != self.columns["crc32"][i]:
            self.storage.forget(*self.span(i))
            content = self.storage.read(*self.span(i))
            if crc32(content) != self.columns["crc32"][i]:
                place = self.places[int(self.shard_of(i))].url
                raise ValueError(f"sample {self.key(i)} in {place} has changed since it was indexed")
        return content

    def image(self, i: int) -> bytes:
        """The picture's file of sample `i`. Raises as `read` does."""
        start = int(self.columns["image_offset"][i])
        return self.read(i)[start : start + int(self.columns["image_size"][i])]

    def parts(self, i: int) -> dict[str, bytes]:
        """The content of each member of sample `i` by its extension. Raises as `read` does."""
        content = self.read(i)
        found = tar.walk(tar.Bytes(content), f"sample {self.key(i)}")
        return {part.extension: content[part.payload : part.payload + part.size] for part in found}

    def key(self, i: int) -> str:
        """WebDataset key of sample `i`."""
        return self._table.column("key")[int(i)].as_py()

    def keys(self) -> list[str]:
        """The keys of all samples."""
        return self._table.column("key").to_pylist()

    def groups(self) -> list[str] | None:
        """The group of each sample (empty text where it has none), or None if no sample has one."""
        return self._table.column("group").to_pylist() if "group" in self._table.column_names else None

    def source(self, i: int) -> str:
        """The picture's path when it was packed, or the key if none is kept. Raises as `read` does."""
        kept = self.parts(i).get(SOURCE)
        return self.key(i) if kept is None else kept.decode(errors="replace")

    def summary(self) -> dict[str, Any]:
        """What logs and reports say of the data set."""
        return {
            "folder": storage.shown(self.folder),
            "samples": len(self),
            "classes": len(self.classes),
            "shards": len(self.shards),
            "bytes": sum(shard.bytes for shard in self.shards),
            "smallest_class": min(self.counts),
            "largest_class": max(self.counts),
            "digest": self.digest[:12],
        }


def join(parts: Sequence[Index]) -> Index:
    """Several sets of the same classes as one, their rows one after the other. Raises ValueError if classes differ."""
    import pyarrow

    first = parts[0]
    if len(parts) == 1:
        return first
    for other in parts[1:]:
        if other.classes != first.classes:
            odd = sorted(set(other.classes) ^ set(first.classes)) or ["their order"]
            raise ValueError(
                f"{first.folder} and {other.folder} differ in classes ({', '.join(odd[:5])}): "
                "pack both with one list: vitdist pack ... --classes FILE"
            )
    keys = pyarrow.concat_tables([part._table.select(["key"]) for part in parts])
    return Index(
        folder=" + ".join(part.folder for part in parts),
        classes=first.classes,
        shards=[shard for part in parts for shard in part.shards],
        places=[place for part in parts for place in part.places],
        counts=np.sum([part.counts for part in parts], axis=0).tolist(),
        digest=hashlib.sha256(" ".join(part.digest for part in parts).encode()).hexdigest(),
        columns={name: np.concatenate([part.columns[name] for part in parts]) for name in COLUMNS},
        starts=np.concatenate([[0], np.cumsum([shard.samples for part in parts for shard in part.shards])]),
        cache=first.cache,
        _table=keys,
    )


# ---- opening --------------------------------------------------------------------------------------


def read_record(folder: str | Path) -> dict[str, Any]:
    """What index.json of a folder or URL says. Raises ValueError with what to run if there is none to be had."""
    place = _join(str(folder), "index.json")
    remote = storage.is_remote(str(folder))
    shown = storage.shown(str(folder))
    again = f"run: vitdist index {shown}" + ("/part-{0000..0099}.tar --out FOLDER" if remote else "")
    try:
        text = storage.fetch(place) if remote else Path(place).read_bytes()
        record = json.loads(text)
        if not isinstance(record, dict) or not {"version", "digest", "shards", "classes"} <= set(record):
            raise ValueError("written by another program")
    except FileNotFoundError:
        if remote:
            raise ValueError(
                f"{storage.shown(place)}: not there; to index shards that lie elsewhere, {again}"
            ) from None
        raise ValueError(_what_is_there(Path(folder))) from None
    except (OSError, ValueError) as error:
        if not remote and not Path(folder).is_dir():
            raise ValueError(_what_is_there(Path(folder))) from None
        if isinstance(error, OSError) and remote:  # names the place and the way out itself
            raise ValueError(str(error)) from None
        raise ValueError(f"{storage.shown(place)}: {error}; {again}") from None
    if record["version"] != VERSION:
        age = "a newer" if record["version"] > VERSION else "an older"
        raise ValueError(
            f"{shown}: indexed by {age} vitdist (version {record['version']}, this one reads {VERSION}): {again}"
        )
    return record


def _what_is_there(folder: Path) -> str:
    """Why `folder` cannot be opened, and what to do."""
    if not folder.is_dir():
        return f"{folder}: no such folder; for one of shards run: vitdist pack PICTURES OUT"
    if tars(folder):
        return f"{folder}: shards without an index; run: vitdist index {folder}"
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and ((p / "index.json").exists() or tars(p)))
    hint = f"did you mean {inside[0]}?" if inside else f"of pictures, run: vitdist pack {folder} OUT"
    return f"{folder}: holds no tar shards: {hint}"


def _check_server(places: list[Place]) -> None:
    """One shard answers, in ranges, and is as long as indexed: what is wrong with one is wrong with most."""
    try:
        size = storage.size(places[0].url)
    except OSError as error:
        raise ValueError(str(error)) from None
    if size != places[0].bytes:
        shown = storage.shown(places[0].url)
        raise ValueError(f"{shown} has {size:,} bytes, not the {places[0].bytes:,} indexed: index the shards again")


def _check_files(folder: Path, base: Path, shards: list[Shard]) -> None:
    again = f"run: vitdist index {folder}"
    mend = f"bring it back, or save what is whole: vitdist verify {folder} --repair OUT"
    for shard in shards:
        path = base / shard.name
        if not path.exists():
            raise ValueError(f"{path} is missing: {mend}")
        if (size := path.stat().st_size) != shard.bytes:
            raise ValueError(f"{path} has {size:,} bytes, not the {shard.bytes:,} indexed: {mend}")
    strange = sorted({path.name for path in tars(base)} - {shard.name for shard in shards})
    if strange and folder == base:
        raise ValueError(f"{base / strange[0]} is not in the index: take it away, or {again}")


def _open_table(folder: str, record: dict[str, Any], samples: int) -> "pyarrow.Table":
    """index.arrow, memory-mapped where it is a local file. Raises ValueError if it is not that of index.json."""
    import pyarrow
    from pyarrow import ipc

    place = _join(folder, "index.arrow")
    try:
        source = pyarrow.BufferReader(storage.fetch(place)) if storage.is_remote(folder) else pyarrow.memory_map(place)
        table = ipc.open_file(source).read_all()
        given = (table.schema.metadata or {}).get(b"digest", b"").decode()
        whole = crc32(source.seek(0) or source.read_buffer()) == record["crc32"]
    except (OSError, pyarrow.ArrowInvalid):
        given, whole = "", False
    if not whole or given != record["digest"] or len(table) != samples or not samples:
        raise ValueError(f"{folder}: index.arrow does not fit index.json: run: vitdist index {folder}")
    return table


def _join(folder: str, name: str) -> str:
    if storage.is_remote(name) or Path(name).is_absolute():
        return name
    return f"{folder.rstrip('/')}/{name}" if storage.is_remote(folder) else str(Path(folder, name))


def tars(folder: Path) -> list[Path]:
    """The shards in `folder`, in the order of their names."""
    return sorted(p for p in folder.glob("*.tar") if not p.name.startswith("."))


# ---- scanning -------------------------------------------------------------------------------------


def scan(path: Path, label: str = LABEL, name: str | None = None) -> Scan:
    """Read a shard whole: hash, and a row for each sample. Raises ValueError naming what is wrong where.

    `label`: cls, txt or json:FIELD (dots for fields of fields). `name`: that of the shard in the index.
    """
    labels, keys, groups = list[str](), list[str](), list[str]()
    rows: list[tuple[int, int, int, int]] = []
    with open(path, "rb", buffering=0) as file:
        source = tar.File(file.fileno())
        if source.length < 2 * tar.BLOCK:
            raise ValueError(f"{path}: {source.length} bytes are no tar: copy or pack the shard again")
        for magic, kind in _PACKED.items():
            if source.read(0, len(magic)) == magic:
                raise ValueError(
                    f"{path}: is compressed ({kind}), and samples inside cannot be reached: unpack it first"
                )
        for parts in tar.samples(source, str(path)):
            row, by_extension = _row(parts, str(path))
            rows.append(row)
            labels.append(_label(source, by_extension, label, str(path), parts[0].key))
            keys.append(parts[0].key)
            groups.append(_text(source, by_extension[GROUP]) if GROUP in by_extension else "")
        checksums, sha256 = _checksums(file, rows)
    if not rows:
        raise ValueError(f"{path}: an empty tar, it holds no samples: take it away, or copy the shard again")
    names = ("offset", "size", "image_offset", "image_size")
    columns = {n: np.array(values, COLUMNS[n]) for n, values in zip(names, zip(*rows, strict=True), strict=True)}
    columns["crc32"] = np.array(checksums, COLUMNS["crc32"])
    return Scan(Shard(name or path.name, source.length, len(rows), sha256), columns, labels, keys, groups)


def _row(parts: list[Part], name: str) -> tuple[tuple[int, int, int, int], dict[str, Part]]:
    """Offset, size, image offset and image size of a sample, and its parts by their extensions."""
    key, start, end = parts[0].key, parts[0].start, parts[-1].end
    by_extension = {part.extension: part for part in parts}
    images = [part for part in parts if part.extension in IMAGES]
    if len(by_extension) < len(parts) or len(images) > 1:
        raise ValueError(f"{name}: sample {key!r} has more than one picture or the same member twice")
    if not images:
        raise ValueError(f"{name}: sample {key!r} has no picture ({', '.join(IMAGES)}) beside it; {_APART}")
    if end - start >= 2**32:
        raise ValueError(f"{name}: sample {key!r} has 4 GiB and more of data")
    return (start, end - start, images[0].payload - start, images[0].size), by_extension


def _checksums(file: io.FileIO, rows: list[tuple[int, int, int, int]]) -> tuple[list[int], str]:
    """CRC-32 of each sample, and SHA-256 of the whole file in hexadecimal."""
    whole, checksums = hashlib.sha256(), []
    buffer = bytearray(1 << 20)
    at = 0

    def through(end: int) -> int:
        """Hash up to `end`; returns the CRC-32 of these bytes."""
        nonlocal at
        checksum = 0
        while at < end:  # read into one buffer that stays in the processor's cache, for both sums
            with memoryview(buffer)[: min(len(buffer), end - at)] as view:
                count = os.preadv(file.fileno(), [view], at)
                if not count:
                    raise ValueError(f"{file.name}: became shorter while it was read")
                whole.update(view[:count])
                checksum = crc32(view[:count], checksum)
            at += count
        return checksum

    for offset, size, _, _ in rows:
        through(offset)
        checksums.append(through(offset + size))
    through(os.fstat(file.fileno()).st_size)
    return checksums, whole.hexdigest()


def _text(source: tar.File, part: Part) -> str:
    return source.read(part.payload, part.size).decode(errors="replace").strip()


def _label(source: tar.File, parts: dict[str, Part], label: str, name: str, key: str) -> str:
    """What the sample's member says of its class, as text."""
    extension, _, field = label.partition(":")
    part = parts.get(extension)
    if part is None:
        there = [f"--label {e}" if e != "json" else "--label json:FIELD" for e in ("cls", "txt", "json") if e in parts]
        hint = f"it has others: {' or '.join(there)}" if there else _APART
        raise ValueError(f"{name}: sample {key!r} has no .{extension} member with its class beside it; {hint}")
    text = _text(source, part)
    if field:
        text = _json_field(text, field, f"{name}: sample {key!r}")
    if not text:
        raise ValueError(f"{name}: the label of {key!r} is empty")
    return text


def _json_field(text: str, field: str, what: str) -> str:
    try:
        value: Any = json.loads(text)
        for inner in field.split("."):
            value = value[inner]
    except (ValueError, KeyError, TypeError, IndexError):
        try:
            there = ", ".join(json.loads(text))
        except (ValueError, TypeError):
            raise ValueError(f"{what}: its .json member is no JSON object") from None
        raise ValueError(f"{what}: its .json has no field {field!r}; there are: {there}") from None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"{what}: its label {field!r} is {value!r:.40}, neither a number nor a name")
    return str(value).strip()


# ---- writing --------------------------------------------------------------------------------------


def write(
    folder: Path,
    scans: Sequence[Scan],
    classes: Sequence[str] | None,
    base: str | None = None,
    by_name: bool = False,
) -> None:
    """Publish the index of `scans`; `base`: where the shards lie, if not in `folder`; `by_name`: labels may be names.

    Raises ValueError if there is no sample, a label has no class, or one shard is there twice.
    """
    import pyarrow

    if not scans:
        raise ValueError(f"{folder}: the shards hold no samples")
    _no_shard_twice(folder, scans)
    names, labels = _classes(folder, scans, classes, by_name)
    columns = {name: np.concatenate([s.columns[name] for s in scans]) for name in COLUMNS if name != "label"}
    columns["label"] = labels.astype(COLUMNS["label"])
    shards = [s.shard for s in scans]
    of_labels = hashlib.sha256(columns["label"].tobytes()).hexdigest()
    identity = json.dumps([VERSION, names, [shard.sha256 for shard in shards], of_labels])
    digest = hashlib.sha256(identity.encode()).hexdigest()
    arrays = {name: pyarrow.array(columns[name]) for name in COLUMNS}
    arrays["key"] = _texts([key for s in scans for key in s.keys])
    if any(any(s.groups) for s in scans):
        arrays["group"] = _texts([group for s in scans for group in s.groups])
    table = _arrow(arrays, {"version": str(VERSION), "digest": digest})
    record = {
        "version": VERSION,
        "digest": digest,
        "crc32": crc32(table),
        "samples": len(labels),
        "classes": names,
        "counts": np.bincount(labels, minlength=len(names)).tolist(),
        "shards": [shard._asdict() for shard in shards],
    }
    if base:
        record["base"] = base
    if classes is not None:
        rundir.publish(folder / "classes.txt", "".join(f"{name}\n" for name in names))
    # The JSON last: a reader that finds it finds the table too.
    rundir.publish(folder / "index.arrow", table)
    rundir.publish(folder / "index.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _no_shard_twice(folder: Path, scans: Sequence[Scan]) -> None:
    first: dict[str, str] = {}
    for scanned in scans:
        name = scanned.shard.name
        if (other := first.setdefault(scanned.shard.sha256, name)) != name:
            raise ValueError(f"{folder}: {name} and {other} are the same shard: take one of them away")


def _classes(
    folder: Path, scans: Sequence[Scan], classes: Sequence[str] | None, by_name: bool
) -> tuple[list[str], np.ndarray]:
    """Class names, and the class number of each sample, int64."""
    texts = [text for s in scans for text in s.labels]
    # Names may be digits too: 0, 2, 1 in a list means these, not places in it.
    if not all(map(_INTEGER.fullmatch, texts)) or (by_name and classes is not None and set(texts) <= set(classes)):
        names = list(classes) if classes is not None else sorted(set(texts))
        number = {name: i for i, name in enumerate(names)}
        unknown = next((i for i, text in enumerate(texts) if text not in number), None)
        if unknown is not None:
            raise ValueError(
                f"{_named(scans, unknown)} has label {texts[unknown]!r}, which is not among the {len(names)} classes"
            )
        return names, np.array([number[text] for text in texts], np.int64)
    longest = max(range(len(texts)), key=lambda i: len(texts[i]))
    if len(texts[longest].strip()) > 18:
        raise ValueError(f"{_named(scans, longest)} has label {texts[longest]}, too high for the number of a class")
    labels = np.array([int(text) for text in texts], np.int64)
    if (lowest := int(labels.argmin())) >= 0 and labels[lowest] < 0:
        raise ValueError(f"{_named(scans, lowest)} has label {labels[lowest]}: classes are numbered from 0")
    highest = int(labels.argmax())
    if classes is None and labels[highest] >= 2**20:
        raise ValueError(f"{_named(scans, highest)} has label {labels[highest]}, too high for the number of a class")
    names = list(classes) if classes is not None else [f"class {i}" for i in range(int(labels[highest]) + 1)]
    if labels[highest] >= len(names):
        raise ValueError(
            f"{folder}: label {labels[highest]} has no name in a list of {len(names)} classes "
            f"({_named(scans, highest)})"
        )
    return names, labels


def _named(scans: Sequence[Scan], row: int) -> str:
    for scanned in scans:
        if row < len(scanned.keys):
            return f"{scanned.shard.name}: sample {scanned.keys[row]!r}"
        row -= len(scanned.keys)
    raise IndexError(row)


def _texts(texts: list[str]) -> "pyarrow.Array":
    """Arrow text; names that are no UTF-8 are told by escapes."""
    import pyarrow

    plain = [text.encode(errors="surrogateescape").decode(errors="backslashreplace") for text in texts]
    return pyarrow.array(plain, pyarrow.large_string())


def _arrow(arrays: "dict[str, pyarrow.Array]", metadata: dict[str, str]) -> bytes:
    import pyarrow
    from pyarrow import ipc

    table = pyarrow.table(arrays).replace_schema_metadata(metadata)
    sink = io.BytesIO()
    with ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


# ---- a whole set ----------------------------------------------------------------------------------


def build(
    shards: str | Path,
    classes: Sequence[str] | None = None,
    workers: int | None = None,
    *,
    label: str = LABEL,
    out: str | Path | None = None,
    progress: bool = False,
) -> None:
    """Index the tars in a folder, or those that a pattern of URLs or paths ({0000..0099} is expanded) names.

    The index lies in `out`, by default beside the shards. Class names come from `classes`, kept as
    classes.txt, else from that file, else from the labels: sorted if they are names, 'class 0' and on if numbers.
    Raises ValueError, naming the shard, for a tar that is damaged or is no classification data.
    """
    if not re.fullmatch(r"cls|txt|json:.+", label):
        raise ValueError(f"--label {label}: write cls, txt or json:FIELD, such as json:label")
    base, names = _shard_names(str(shards))
    folder = Path(out) if out else Path(base)
    if not out and storage.is_remote(base):
        raise ValueError(f"{shards}: say with --out in which folder the index of remote shards is to lie")
    kept = read_classes(folder / "classes.txt") if (folder / "classes.txt").exists() else None
    if label == LABEL and classes is not None and kept is not None and list(classes) != kept:
        # Numbers of one list read by another are other classes, without a word.
        raise ValueError(
            f"{folder}: its labels are numbers of its own classes.txt ({', '.join(kept[:5])} ...), not of another "
            "list: pack it again with that list, or delete classes.txt if only names are to change"
        )
    classes = kept if classes is None else classes
    parts = folder / ".index"
    (parts).mkdir(parents=True, exist_ok=True)
    work = partial(_scan_once, base, label, parts)
    scans = parallel.each(work, names, "indexing", workers=workers, progress=progress)
    write(folder, scans, classes, None if folder == Path(base) else base, by_name=label != LABEL)


def read_classes(place: str | Path) -> list[str]:
    """Class names: one a line in a file, or those of an indexed folder."""
    if Path(place).is_dir():
        return read_record(place)["classes"]
    lines = Path(place).read_text(encoding="utf-8").split("\n")
    return [line.rstrip("\r") for line in lines if line.strip()]


def _shard_names(shards: str) -> tuple[str, list[str]]:
    """Folder or URL, and the names of the shards in it."""
    from braceexpand import braceexpand

    if not storage.is_remote(shards) and Path(shards).is_dir():
        found = tars(Path(shards))
        if not found:
            raise ValueError(f"{_what_is_there(Path(shards))}")
        return shards, [path.name for path in found]
    expanded = [
        found
        for part in braceexpand(shards)
        for found in (sorted(glob.glob(part)) if "*" in part and not storage.is_remote(part) else [part])
    ]
    if storage.is_remote(shards) and not all(place.endswith(".tar") for place in expanded):
        raise ValueError(
            f"{shards}: what lies there cannot be listed: name the shards, {shards}/part-{{0000..0099}}.tar"
        )
    if not all(place.endswith(".tar") for place in expanded):
        raise ValueError(f"{shards}: no such folder, and no names of shards such as part-{{0000..0099}}.tar")
    absent = [place for place in expanded if not storage.is_remote(place) and not Path(place).is_file()]
    if absent or not expanded:
        raise ValueError(f"{absent[0] if absent else shards}: no such shard")
    bases = {place.rpartition("/")[0] or "." for place in expanded}
    if len(bases) > 1:
        raise ValueError(f"{shards}: the shards of one index lie in one folder, not in {len(bases)}: index each alone")
    return bases.pop(), [place.rpartition("/")[2] for place in expanded]


def _scan_once(base: str, label: str, parts: Path, name: str) -> Scan:
    """`scan`, or what an earlier one of the unchanged shard left in `parts`."""
    kept = parts / f"{name}.arrow"
    place = _join(base, name)
    if storage.is_remote(place):
        size = storage.size(place)
        stamp = f"{VERSION} {label} {place} {size}"
        if (found := _read_part(kept, stamp)) is not None:
            return found
        with tempfile.TemporaryDirectory(dir=parts) as folder:
            local = Path(folder, name)
            storage.download(place, local)
            scanned = scan(local, label, name)
    else:
        status = Path(place).stat()
        # ctime too: it cannot be set back by a copy that keeps the times of what it replaces the shard with
        stamp = f"{VERSION} {label} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
        if (found := _read_part(kept, stamp)) is not None:
            return found
        scanned = scan(Path(place), label)
    _write_part(kept, stamp, scanned)
    return scanned


def _write_part(path: Path, stamp: str, scanned: Scan) -> None:
    import pyarrow

    arrays = {name: pyarrow.array(values) for name, values in scanned.columns.items()}
    arrays |= {"class": _texts(scanned.labels), "key": _texts(scanned.keys), "group": _texts(scanned.groups)}
    rundir.publish(path, _arrow(arrays, {"stamp": stamp, "shard": json.dumps(scanned.shard._asdict())}))


def _read_part(path: Path, stamp: str) -> Scan | None:
    import pyarrow
    from pyarrow import ipc

    try:
        table = ipc.open_file(pyarrow.memory_map(str(path))).read_all()
    except (OSError, pyarrow.ArrowInvalid):
        return None
    about = table.schema.metadata or {}
    if about.get(b"stamp") != stamp.encode():
        return None
    columns = {name: table.column(name).to_numpy() for name in COLUMNS if name != "label"}
    texts = [table.column(name).to_pylist() for name in ("class", "key", "group")]
    return Scan(Shard(**json.loads(about[b"shard"])), columns, *texts)
