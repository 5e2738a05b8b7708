"""Files as rows: each format's rows, one after the other, with the number that finds a row again in the file.

That is the line in text files and CSV (the first line of a row that has several), the sheet's row in Excel, and
elsewhere the row's position, counted from 1. A row that cannot be read is handed on as a :class:`BadRow` in its place:
one broken line costs itself. Nothing here knows what the columns mean.
"""

from __future__ import annotations

import csv
import datetime
import difflib
import itertools
import json
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from .problems import BadRow, DataError, kind, no_unicode, shown

BATCH = 1000
"""Rows of a columnar file that are Python objects at a time."""

Item = tuple[int, dict[str, Any] | BadRow]


@dataclass
class Source:
    """Rows to be read once.

    Attributes:
        name: as the user wrote it.
        items: (number, row or why it cannot be read).
        columns: names of the columns; None where every row has its own.
        table: the whole, where it is a data set of the hub.
        part: what of the file is read, if not all of it.
    """

    name: str
    items: Iterator[Item]
    columns: list[str] | None = None
    table: Dataset | None = None
    part: str | None = None


def read_file(path: Path, sheet: str | None = None) -> Source:
    """Open a file, by the end of its name.

    Args:
        path: the file.
        sheet: of an Excel file; None takes the first.

    Raises:
        DataError: when there is no such file, it is empty, of no known format, or broken as a whole.
    """
    if not path.is_file():
        near = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, near, n=1)
        raise DataError(f"there is no file {path}" + (f", did you mean {close[0]!r}?" if close else ""))
    read = FORMATS.get(path.suffix.lower())
    if read is None:
        hint = "; save it as .xlsx" if path.suffix.lower() in (".xls", ".xlsm", ".xlsb", ".ods") else ""
        raise DataError(f"{path} is no {', '.join(FORMATS)} file{hint}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    return _excel(path, sheet) if read is _excel else read(path)


def read_dataset(name: str, rows: Dataset) -> Source:
    """A loaded data set, in batches."""
    batches = rows.with_format("arrow").iter(BATCH)
    return Source(name, _records(name, batches), rows.column_names, table=rows)


# -- text --------------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, str | BadRow]]:
    """Lines that hold something. Bytes that are no UTF-8 become lone surrogates, which cost their own line only."""
    with path.open(encoding=_encoding(path), errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _not_utf8(line) or line


def _encoding(path: Path) -> str:
    """UTF-8, or UTF-16 where a byte-order mark says so, as Excel's "Unicode text" does."""
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _not_utf8(text: str) -> BadRow | None:
    position = no_unicode(text)
    return BadRow(f"not UTF-8 at character {position}; save the file as UTF-8") if position else None


def _text(path: Path) -> Source:
    def items() -> Iterator[Item]:
        for number, line in _lines(path):
            yield number, line if isinstance(line, BadRow) else {"text": line.rstrip("\r\n")}

    return Source(str(path), items(), ["text"])


# -- JSON --------------------------------------------------------------------------------------------------------------


def _json(path: Path) -> Source:
    """One value in the whole file, or one a line, whatever the file is called."""
    _, first = next(_lines(path), (0, ""))
    whole_name = path.suffix.lower() == ".json"
    if not whole_name and (isinstance(first, BadRow) or not first.lstrip().startswith("[")):
        return _json_lines(path)
    try:
        text = path.read_text(encoding=_encoding(path), errors="surrogateescape")
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") or not whole_name:
            return _json_lines(path)
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{path}: not JSON that can be read: nested too deeply") from None
    if isinstance(value, dict):
        value = _rows_of(path, value)
    if not isinstance(value, list):
        raise DataError(f"{path} holds {kind(value)}, not a list of rows")
    return Source(str(path), ((number, _row(row)) for number, row in enumerate(value, 1)))


def _rows_of(path: Path, value: dict[str, Any]) -> list[Any]:
    """The rows of an object: it is a row itself, or wraps a list of them, or holds columns."""
    if not value or not all(isinstance(column, list) for column in value.values()):
        return [value]
    (name, first), *others = value.items()
    if not others and first and all(isinstance(entry, dict) for entry in first):
        return [value] if name in ("messages", "conversations", "prompt", "completion") else first
    # Prompt and completion may both be messages: then the object is one conversation and not its columns.
    if set(value) >= {"prompt", "completion"} and all(isinstance(e, dict) for e in first):
        return [value]
    lengths = {name: len(column) for name, column in value.items()}
    if len(set(lengths.values())) > 1:
        sizes = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise DataError(f"{path} holds columns of different lengths: {sizes}")
    return [dict(zip(value, entries, strict=True)) for entries in zip(*value.values(), strict=True)]


def _json_lines(path: Path) -> Source:
    def items() -> Iterator[Item]:
        for number, line in _lines(path):
            try:
                yield number, line if isinstance(line, BadRow) else _row(json.loads(line))
            except json.JSONDecodeError as error:
                yield number, BadRow(f"not JSON: {error.msg} at column {error.colno}")
            except (RecursionError, ValueError):  # the latter: a number of thousands of digits
                yield number, BadRow("not JSON that can be read: nested too deeply, or a number too long")

    return Source(str(path), items())


def _row(value: Any) -> dict[str, Any] | BadRow:
    if not isinstance(value, dict):
        return BadRow(f"holds {'null' if value is None else kind(value)}, not an object with columns")
    return value if value else BadRow("is empty")


# -- tables of text ----------------------------------------------------------------------------------------------------


def _csv(path: Path) -> Source:
    return _separated(path, None)


def _tsv(path: Path) -> Source:
    return _separated(path, "\t")


def _separated(path: Path, delimiter: str | None) -> Source:
    rows = _separated_rows(path, delimiter)
    number, header = next(rows, (1, BadRow("holds no header")))
    if isinstance(header, BadRow):
        raise DataError(f"{path}:{number}: the line of the columns' names: {header}")
    columns = _header(path, number, header)
    return Source(str(path), _with_header(columns, rows), columns)


def _separated_rows(path: Path, delimiter: str | None) -> Iterator[tuple[int, list[str] | BadRow]]:
    limit = csv.field_size_limit(sys.maxsize)  # the module's own limit is 128 KiB a field
    try:
        with path.open(encoding=_encoding(path), errors="surrogateescape", newline="") as file:
            delimiter = delimiter or _delimiter(file.readline())
            file.seek(0)
            # Strict: a quote that stands wrong would otherwise swallow the following rows without a word.
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            while True:
                number = reader.line_num + 1
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield number, BadRow(_quotes(str(error), reader.line_num))
                    continue
                if fields:
                    yield number, _not_utf8("\n".join(fields)) or fields
    finally:
        csv.field_size_limit(limit)


def _quotes(error: str, last: int) -> str:
    if "unexpected end of data" in error:
        return f'a quote (") is opened and never closed: everything up to line {last} is one field'
    return f"not CSV: {error} (a quote inside of a field is written twice)"


def _delimiter(header: str) -> str:
    """A comma, unless the header has none: in half of the world Excel writes semicolons."""
    return max(",;\t", key=header.count)


def _header(path: Path, number: int, names: Iterable[Any]) -> list[str]:
    columns = [str(name).strip() if name is not None else "" for name in names]
    while columns and not columns[-1]:
        columns.pop()
    columns = [name or f"column {position}" for position, name in enumerate(columns, 1)]
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise DataError(f"{path}:{number}: the column {twice[0]!r} is there twice; rename one")
    if not columns:
        raise DataError(f"{path}:{number}: the row of the columns' names is empty")
    return columns


def _with_header(columns: list[str], rows: Iterable[tuple[int, list[Any] | BadRow]]) -> Iterator[Item]:
    for number, fields in rows:
        if isinstance(fields, BadRow):
            yield number, fields
        elif not any(fields):
            yield number, BadRow("is empty")
        elif len(fields) != len(columns):
            yield number, BadRow(f"has {len(fields)} fields; the header names {len(columns)} columns")
        else:
            yield number, dict(zip(columns, fields, strict=True))


# -- Excel -------------------------------------------------------------------------------------------------------------


# openpyxl trusts what is in the file; these are what a damaged one was seen to raise.
_BROKEN_BOOK = (
    *(zipfile.BadZipFile, zlib.error, ElementTree.ParseError, EOFError, OSError, RuntimeError),
    *(AttributeError, LookupError, TypeError, ValueError),
)


def _excel(path: Path, sheet: str | None = None) -> Source:
    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        # Formulas as the values that Excel saved with them.
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (InvalidFileException, *_BROKEN_BOOK) as error:
        raise DataError(
            f"{path} is no Excel file that can be read ({error or type(error).__name__}); a password has to be removed"
        ) from None
    sheets = {page.title: page for page in book.worksheets}
    if not sheets:
        raise DataError(f"{path} has no sheet with cells")
    name = sheet or next(iter(sheets))
    if name not in sheets:
        close = difflib.get_close_matches(name, sheets, n=1)
        meant = f", did you mean {close[0]!r}?" if close else ";"
        raise DataError(f"{path} has no sheet {name!r}{meant} its sheets are {', '.join(sheets)}")
    page = sheets[name]
    page.reset_dimensions()  # what other programs write there is often wrong, and would cut the sheet off
    rows = _excel_rows(path, book, page)
    number, header = next(rows, (1, []))
    if isinstance(header, BadRow):
        raise DataError(f"{path}:{number}: the row of the columns' names: {header}")
    columns = _header(path, number, header)
    # Rows of a sheet end with their last cell that was ever touched.
    even = ((n, r if isinstance(r, BadRow) else _even(r, len(columns))) for n, r in rows)
    return Source(str(path), _with_header(columns, even), columns, part=f"sheet {name}" if len(sheets) > 1 else None)


def _excel_rows(path: Path, book: Any, page: Any) -> Iterator[tuple[int, list[str | None] | BadRow]]:
    """Rows that hold something, from the first that does."""
    number = 0
    try:
        for number, cells in enumerate(page.iter_rows(), 1):
            if all(cell.value is None for cell in cells):
                continue
            broken = [cell for cell in cells if cell.data_type == "e"]
            if broken:
                yield number, BadRow(f"cell {broken[0].coordinate} holds Excel's error {broken[0].value}")
            else:
                yield number, [_cell(cell.value) for cell in cells]
    except _BROKEN_BOOK as error:
        raise DataError(f"{path}:{number + 1}: the file is broken here: {error}") from None
    finally:
        book.close()


def _cell(value: Any) -> str | None:
    """A cell as text. A sheet does not say whether 42 was meant as a number."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.isoformat(" ") if isinstance(value, datetime.datetime) else str(value)


def _even(cells: list[str | None], width: int) -> list[str | None]:
    while len(cells) > width and cells[-1] is None:
        cells = cells[:-1]
    return cells + [None] * (width - len(cells))


# -- columns -----------------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Source:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} is no Parquet file that can be read: {error}") from None
    return Source(str(path), _records(str(path), file.iter_batches(BATCH)), file.schema_arrow.names)


def _arrow(path: Path) -> Source:
    """Arrow's file format, or the stream that ``Dataset.save_to_disk`` writes."""
    try:
        file = pa.memory_map(str(path))
        try:
            opened = pa.ipc.open_file(file)
            batches: Iterable[pa.RecordBatch] = map(opened.get_batch, range(opened.num_record_batches))
        except pa.ArrowInvalid:
            file.seek(0)
            opened = batches = pa.ipc.open_stream(file)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} is no Arrow file that can be read: {error}") from None
    return Source(str(path), _records(str(path), batches), opened.schema.names)


def _records(name: str, batches: Iterable[Any]) -> Iterator[Item]:
    count = itertools.count(1)
    try:
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH):
                for row in _objects(batch.slice(start, BATCH)):
                    yield next(count), row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} is broken near row {next(count)}: {error}") from None


def _objects(batch: Any) -> list[dict[str, Any] | BadRow]:
    """Rows as Python objects. What a file says about its own bytes is checked before any is followed."""
    try:
        batch.validate(full=True)
        return batch.to_pylist()
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        if batch.num_rows == 1:
            return [BadRow(f"is broken, or not UTF-8: {shown(str(error), 100)}")]
        return [row for index in range(batch.num_rows) for row in _objects(batch.slice(index, 1))]


FORMATS: dict[str, Callable[[Path], Source]] = {
    ".json": _json,
    ".jsonl": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".tsv": _tsv,
    ".xlsx": _excel,
    ".arrow": _arrow,
    ".txt": _text,
}
