"""Columns of a table, and the pictures in its rows: CSV, TSV, JSON lines, Parquet and the Arrow files of `datasets`.

    table = tables.read_header(Path("metadata.csv"))
    labels = tables.texts(table, ["dx"])["dx"]
    for content in tables.payloads(table, "image", first=0, last=100): ...

All values are texts, so that the patient "007" stays who he is. Pictures are read a row group at a time.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FORMATS = ("csv", "tsv", "jsonl", "parquet")

_WHOLE = re.compile(r"-?\d+\.0")
# Rows that lie in memory at once while pictures are read: 64 of 1 MB.
_BATCH = 64


class Table(NamedTuple):
    path: Path
    columns: list[str]
    holding: dict[str, bool]
    """Columns with the bytes of pictures; whether they are structs of bytes and path, as `datasets` writes."""
    names: dict[str, list[str]]
    """Class names of the columns that `datasets` keeps as numbers (ClassLabel)."""

    def row(self, at: int) -> str:
        """How a person finds row `at`: a spreadsheet counts the header of a CSV."""
        return f"{self.path} row {at + 1 + (self.path.suffix.lower() in ('.csv', '.tsv'))}"


def read_header(path: Path) -> Table:
    """Raises ValueError in one line for a file that is no such table."""
    form = path.suffix[1:].lower()
    try:
        if form in ("csv", "tsv"):
            columns = _csv(path).schema.names
        elif form == "jsonl":
            columns = list(dict.fromkeys(key for record in _records(path) for key in record))
        elif form in ("parquet", "arrow"):
            return _typed_header(path)
        else:
            raise ValueError(f"not a table that can be read ({', '.join(FORMATS)})")
    except ValueError as error:  # pyarrow's own are ValueErrors too
        raise ValueError(f"{path}: {_first_line(error)}") from None
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: two columns are called {twice[0]!r}: rename one")
    return Table(path, columns, {}, {})


def _first_line(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{text}: save it as UTF-8" if "UTF8" in text or "utf-8" in text else text


def _typed_header(path: Path) -> Table:
    import pyarrow as pa

    schema = _parquet(path).schema_arrow if path.suffix.lower() == ".parquet" else _arrow(path).schema
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    holding = {}
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            holding[field.name] = True
        elif pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            holding[field.name] = False
    names = {
        name: list(feature["names"])
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
    return Table(path, schema.names, holding, names)


# ---- texts ----------------------------------------------------------------------------------------


def texts(table: Table, columns: list[str]) -> dict[str, list[str | None]]:
    """The values of `columns`, stripped; None where there is none (empty, null, NaN). Raises as `read_header`."""
    form = table.path.suffix[1:].lower()
    try:
        if form == "jsonl":
            records = list(_records(table.path))
            return {name: [_text(record.get(name)) for record in records] for name in columns}
        if form in ("csv", "tsv"):
            read = _csv(table.path, columns).read_all()
        elif form == "parquet":
            read = _parquet(table.path).read(columns, use_threads=False)
        else:
            read = _arrow(table.path).select(columns)
    except ValueError as error:
        raise ValueError(f"{table.path}: {_first_line(error)}") from None
    return {name: [_text(value) for value in read.column(name).to_pylist()] for name in columns}


def picture_names(table: Table, column: str) -> list[str | None]:
    """What the rows say their pictures were called."""
    if not table.holding[column]:
        return [None] * _rows(table)
    if table.path.suffix.lower() == ".parquet":
        values = _parquet(table.path).read([f"{column}.path"], use_threads=False).column(column)
    else:
        values = _arrow(table.path).column(column)
    import pyarrow.compute as pc

    return pc.struct_field(values, "path").to_pylist()


def _text(value: Any) -> str | None:
    if isinstance(value, list | dict):
        raise ValueError(
            f"a cell holds {str(value)[:40]}, a list or record: a picture has one class, given as text or number"
        )
    text = "" if value is None else str(value).strip()
    if _WHOLE.fullmatch(text):
        text = text[:-2]  # pandas turns whole numbers into floats where one is missing
    return None if text.lower() in ("", "nan", "none", "null", "<na>", "n/a") else text


def _csv(path: Path, columns: list[str] | None = None) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    with open(path, "rb") as file:
        header = file.readline()
    # Spreadsheets with a decimal comma write semicolons.
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=lambda c: header.count(c.encode()))
    return csv.open_csv(
        path,
        csv.ReadOptions(use_threads=False),
        csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns or (), pa.string())),
    )


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is not JSON ({error.msg})") from None
                if not isinstance(record, dict):
                    raise ValueError(f"line {number} is not an object with a value for each column")
                yield record


def complete(table: Table, texts: list[str | None], what: str, way_out: str) -> None:
    """Raises ValueError for the first row without a value."""
    if None in texts:
        count = texts.count(None)
        more = f", nor have {count - 1:,} more rows" if count > 1 else ""
        raise ValueError(f"{table.row(texts.index(None))} has no {what}{more}: {way_out}")


# ---- pictures in rows -----------------------------------------------------------------------------


def _parquet(path: Path) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(path, pre_buffer=False)


def _arrow(path: Path) -> Any:
    """Memory-mapped: nothing is read before it is used."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        try:
            return pa.ipc.open_stream(file).read_all()
        except pa.ArrowInvalid:
            file.seek(0)
            return pa.ipc.open_file(file).read_all()


def _rows(table: Table) -> int:
    return (
        _parquet(table.path).metadata.num_rows if table.path.suffix.lower() == ".parquet" else len(_arrow(table.path))
    )


def spans(table: Table, largest: int) -> list[tuple[int, int]]:
    """First and last row (not included) of pieces that are read alone at no loss, of some `largest` bytes."""
    if table.path.suffix.lower() == ".parquet":
        metadata = _parquet(table.path).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    else:
        sizes = [(batch.num_rows, batch.nbytes) for batch in _arrow(table.path).to_batches()]
    pieces: list[tuple[int, int]] = []
    row, filled = 0, largest
    for rows, size in sizes:
        if filled + size > largest:
            pieces.append((row, row))
            filled = 0
        row += rows
        filled += size
        pieces[-1] = pieces[-1][0], row
    return pieces


def payloads(table: Table, column: str, first: int, last: int) -> Iterator[bytes | None]:
    """The pictures' files in rows `first` to `last` (not included), which are a piece of `spans`."""
    for batch in _batches(table, column, first, last):
        values = batch.column(column)
        for value in values:
            if table.holding[column]:
                value = value["bytes"] if value.is_valid else value
            yield value.as_py() if value.is_valid else None


def _batches(table: Table, column: str, first: int, last: int) -> Iterator[Any]:
    if table.path.suffix.lower() != ".parquet":
        yield from _arrow(table.path).select([column]).slice(first, last - first).to_batches(_BATCH)
        return
    file, groups, row = _parquet(table.path), [], 0
    for number in range(file.metadata.num_row_groups):
        if first <= row < last:
            groups.append(number)
        row += file.metadata.row_group(number).num_rows
    wanted = f"{column}.bytes" if table.holding[column] else column
    yield from file.iter_batches(_BATCH, groups, [wanted], use_threads=False)
