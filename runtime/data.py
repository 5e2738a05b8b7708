"""Data to train on: a file or a data set of the hub, read, recognised, and its bad rows left out by name.

:mod:`.formats` reads files, :mod:`.rows` knows what columns mean, :mod:`.templates` puts columns together.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from .formats import BATCH, FORMATS, Item, Source, read_dataset, read_file
from .image_rows import as_array, detect_images, has_images, table_in
from .images import ImageRules
from .preference_rows import detect_preferences
from .problems import BadRow, DataError, Problems, shown
from .rows import Shape, Templates, detect, unchatted

__all__ = ["Data", "DataError", "Templates", "is_conversational", "load_data", "load_rows"]

SAMPLE = 100
"""Rows that are looked at to find out what all are."""


@dataclass
class Data:
    """Rows to train on, and what was found about them; ``print`` it.

    Attributes:
        name: as the user wrote it.
        rows: in a form that TRL reads.
        shape: what they were.
        columns: all that there were.
        problems: the rows that were left out.
        part: what of a file was read, if not all of it.
        numbers: of each row in its file, see :mod:`.formats`; empty for tokens of the hub.
    """

    name: str
    rows: Dataset = field(repr=False)
    shape: Shape
    columns: list[str]
    problems: Problems
    part: str | None = None
    numbers: Sequence[int] = field(default=(), repr=False)

    def row_name(self, index: int) -> str:
        """``file:row`` of the row at a position, counted from 0."""
        return f"{self.name}:{self.numbers[index] if self.numbers else index + 1}"

    @property
    def has_images(self) -> bool:
        """Whether rows have ``images``, which only a processor can prepare."""
        return self.shape.images

    @property
    def is_pairs(self) -> bool:
        """Whether rows are a question and its answer each, which can do without a chat template."""
        return self.shape.gap is not None

    def without_chat(self) -> Data:
        """Pairs as plain texts; the completion alone is trained on, as before."""
        gap = self.shape.gap or ""
        rows = Dataset.from_list([unchatted(row, gap) for row in self.rows])  # type: ignore[arg-type]
        shape = Shape(f"{self.shape.name} (plain text: the model has no chat template)", self.shape.columns, dict)
        return Data(self.name, rows, shape, self.columns, self.problems, self.part, self.numbers)

    def __str__(self) -> str:
        part = f", {self.part}" if self.part else ""
        unused = [column for column in self.columns if column not in self.shape.columns]
        rest = f"; not used: {', '.join(unused)}" if unused else ""
        count = f"{len(self.rows):,} row{'s' * (len(self.rows) != 1)}"
        used = ", ".join(self.shape.columns)
        lines = [f"data        {self.name}{part}: {count}, {self.shape.name} ({used}{rest})"]
        if self.problems.count:
            lines.append(f"dropped     {self.problems.count:,} of {len(self.rows) + self.problems.count:,} rows")
            lines += [f"            {line}" for line in str(self.problems).splitlines()]
        return "\n".join(lines)


def load_data(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
    templates: Templates | None = None,
    strict: bool = False,
    preferences: bool = False,
    images: ImageRules | None = None,
) -> Data:
    """Load a data set, find out what its rows are, and bring them into a form that TRL reads.

    Args:
        name: a file of one of :data:`~unsloth.runtime.formats.FORMATS`, a folder of images with a table of them, or an
            id on the hub.
        config: configuration of a hub data set, or the sheet of an Excel file.
        split: of a hub data set; a file has only "train".
        text_field: the column that holds plain text.
        templates: how columns become a prompt and its completion, where their names do not say it.
        strict: refuse the data when a row cannot be used, instead of leaving it out.
        preferences: rows are pairs of answers, see :mod:`.preference_rows`.
        images: what is done with images; their paths are relative to the file's folder.

    Raises:
        DataError: naming what was looked for and what was found instead, with file and row where it is a row.
    """
    try:
        source = _open(name, config, split)
        return _load(source, text_field, templates or Templates(), strict, preferences, images or ImageRules())
    except UnicodeDecodeError as error:  # of UTF-16; what is wrong in UTF-8 costs its row only
        raise DataError(
            f"data set {name!r} cannot be read: {error.encoding}, {error.reason}; save it as UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"data set {name!r} cannot be read: {error.strerror or error}") from None


def _shape(
    name: str,
    columns: Sequence[str],
    sample: Sequence[dict[str, Any]],
    preferences: bool,
    images: ImageRules,
    **how: Any,
) -> Shape:
    if preferences:
        return detect_preferences(name, columns, sample, **how)
    if has_images(columns, sample):
        file = Path(name).expanduser()
        rules = replace(images, folder=file.parent if file.is_file() else images.folder)
        return detect_images(name, columns, sample, rules=rules, **how)
    return detect(name, columns, sample, **how)


def _load(
    source: Source, text_field: str, templates: Templates, strict: bool, preferences: bool, images: ImageRules
) -> Data:
    name = source.name
    first, columns, problems, found = _first(source, templates)
    if not found:
        if problems.count:
            raise DataError(f"data set {name!r} cannot be read: none of its {problems.count:,} rows can\n{problems}")
        raise DataError(f"data set {name!r} has no rows")
    shape = _shape(name, columns, found, preferences, images, templates=templates, text_field=text_field)
    if shape.name == "tokens" and source.table is not None:
        rows, problems, numbers = source.table, Problems(), ()  # made for training: as it is, in its place on the disk
    else:
        rows, problems, numbers = _converted(source, itertools.chain(first, source.items), shape)
    if problems.count and strict:
        total = len(rows) + problems.count
        raise DataError(f"{problems.count:,} of {total:,} rows of {name!r} cannot be used (strict_data):\n{problems}")
    if len(rows) == 0:
        raise DataError(
            f"data set {name!r} has no rows that can be used: all {problems.count:,} were read as {shape.name} and "
            f"dropped\n{problems}"
        )
    return Data(name, rows, shape, columns, problems, source.part, numbers)


@dataclass
class Preview:
    """The first rows of a data set; ``print`` it.

    Attributes:
        name: as the user wrote it.
        shape: what the rows are; None for a data set of the hub, which is not fetched.
        first: the first sound row, in a form that TRL reads.
        unused: columns that nothing is made of.
        problems: rows among them that would be left out.
        looked_at: rows.
        rows: the sound ones among them, in a form that TRL reads.
        numbers: of each of those in its file.
    """

    name: str
    shape: Shape | None = None
    first: dict[str, Any] | None = None
    unused: list[str] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)
    looked_at: int = 0
    rows: Sequence[dict[str, Any]] = field(default=(), repr=False)
    numbers: Sequence[int] = field(default=(), repr=False)

    @property
    def is_chat(self) -> bool:
        """Whether only a chat template can make texts of the rows."""
        first = self.first or {}
        lists = any(isinstance(value, list) for value in first.values())
        return lists and "input_ids" not in first and self.shape is not None and self.shape.gap is None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.name}: on the hub, fetched when the run begins"
        rest = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        lines = [f"{self.name}: {self.shape.name} ({', '.join(self.shape.columns)}{rest})"]
        if self.problems.count:
            lines.append(f"{self.problems.count:,} of the first {self.looked_at:,} rows would be left out")
            lines += str(self.problems).splitlines()
        return "\n".join(lines)


def preview(
    name: str,
    *,
    config: str | None = None,
    text_field: str = "text",
    templates: Templates | None = None,
    strict: bool = False,
    preferences: bool = False,
    images: ImageRules | None = None,
) -> Preview:
    """The first rows of what :func:`load_data` would load, in the time that they take.

    Raises:
        DataError: as :func:`load_data` does, as far as these rows and the file's form show it.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() not in FORMATS and not path.exists():
        return Preview(name)
    templates = templates or Templates()
    try:
        source = read_file(_file(path), config)
        first, columns, problems, found = _first(source, templates)
    except UnicodeDecodeError as error:
        raise DataError(f"data set {name!r} cannot be read: {error.encoding}, {error.reason}") from None
    except OSError as error:
        raise DataError(f"data set {name!r} cannot be read: {error.strerror or error}") from None
    if not found:
        raise DataError(f"data set {name!r} has no rows" + (f" that can be read\n{problems}" if problems.count else ""))
    how: dict[str, Any] = {"templates": templates, "text_field": text_field}
    shape = _shape(source.name, columns, found, preferences, images or ImageRules(), **how)
    problems, numbers = Problems(), array("Q")
    rows = list(_sound(source.name, first, shape, problems, numbers))
    if problems.count and (strict or not rows):
        raise DataError(f"{problems.count:,} of the first {len(first):,} rows of {name!r} cannot be used:\n{problems}")
    unused = [column for column in columns if column not in shape.columns]
    return Preview(name, shape, rows[0], unused, problems, len(first), rows, numbers)


def _sound(
    name: str, items: Iterable[Item], shape: Shape, problems: Problems, numbers: array[int]
) -> Iterator[dict[str, Any]]:
    """The rows that can be used; notes why the others cannot, and the numbers of those that can."""
    for number, row in items:
        try:
            if isinstance(row, BadRow):
                raise row
            converted = shape.convert(row)
            numbers.append(number)
            yield converted
        except BadRow as reason:
            problems.add(name, number, reason)


def load_rows(name: str, *, config: str | None = None, split: str = "train", text_field: str = "text") -> Dataset:
    """The rows of :func:`load_data` alone."""
    return load_data(name, config=config, split=split, text_field=text_field).rows


def is_conversational(rows: Dataset) -> bool:
    """Whether rows hold messages, which need a chat template, and not finished text."""
    return any(isinstance(rows[0].get(column), list) for column in ("messages", "prompt", "completion", "chosen"))


def _open(name: str, config: str | None, split: str) -> Source:
    path = Path(name).expanduser()
    if path.suffix.lower() in FORMATS or path.exists():
        return read_file(_file(path), config)
    try:
        return read_dataset(name, load_dataset(name, config, split=split))
    except DatasetNotFoundError:
        raise DataError(f"no data set {name!r}: it is no file here, and the hub does not have it") from None
    except (DatasetsError, ValueError, OSError) as error:
        # datasets wraps what went wrong; the innermost cause names the row or the split
        if "corresponds to no data" in str(error):
            raise DataError(f"data set {name!r} has no rows") from None
        raise DataError(f"data set {name!r} cannot be read: {_innermost(error)}") from error


def _file(path: Path) -> Path:
    return table_in(path) if path.is_dir() else path


def _first(source: Source, templates: Templates) -> tuple[list[Item], list[str], Problems, list[dict[str, Any]]]:
    """The first rows: (as read, their columns, what is wrong with them, the sound ones).

    As many as show what all are. Rows of JSON have columns of their own, and one that a template names may come late.
    """
    items: list[Item] = []
    found: list[dict[str, Any]] = []
    problems, columns = Problems(), dict.fromkeys(source.columns or ())
    for number, row in source.items:
        items.append((number, row))
        if isinstance(row, BadRow):
            problems.add(source.name, number, row)
            continue
        found.append(row)
        columns.update(dict.fromkeys(row))
        if len(found) >= SAMPLE and (source.columns is not None or templates.columns <= columns.keys()):
            break
    return items, list(columns), problems, found


def _converted(source: Source, items: Iterable[Item], shape: Shape) -> tuple[Dataset, Problems, Sequence[int]]:
    problems, numbers = Problems(), array("Q")
    rows = _sound(source.name, items, shape, problems, numbers)
    tables = []
    try:
        # Batches, because a row takes ten times its size as Python objects.
        while batch := list(itertools.islice(rows, BATCH)):
            names = dict.fromkeys(column for row in batch for column in row)
            values = {column: [row.get(column) for row in batch] for column in names}
            if shape.images:
                values = {column: as_array(column, rows_of) for column, rows_of in values.items()}
            tables.append(pa.table(values))
        table = pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"data set {source.name!r}: {', '.join(shape.columns)} hold values of different types in different rows, "
            f"which a table cannot: {shown(str(error), 200)}"
        ) from None
    return Dataset(table), problems, numbers  # type: ignore[arg-type]


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
