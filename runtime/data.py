"""Rows to train on: a file or a data set of the hub, in one of the forms that TRL reads."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
COLUMNS = {
    "a conversation": {"messages"},
    "a prompt and its completion": {"prompt", "completion"},
    "plain text": {"text"},
    "tokens": {"input_ids"},
}


class DataError(ValueError):
    """There is no such data, it is empty, or it has not the columns to train on."""


def load_rows(name: str, *, config: str | None = None, split: str = "train", text_field: str = "text") -> Dataset:
    """Load a data set and check that it can be trained on.

    Args:
        name: a .json, .jsonl, .csv or .parquet file, or an id on the hub.
        config: configuration of a hub data set.
        split: of a hub data set; a file has only "train".
        text_field: the column that holds plain text.

    Raises:
        DataError: naming what was looked for and what was found instead.
    """
    path = Path(name).expanduser()
    try:
        if path.suffix.lower() in FORMATS or path.exists():
            rows = _from_file(path)
        else:
            rows = load_dataset(name, config, split=split)
    except DataError:
        raise
    except DatasetNotFoundError:
        raise DataError(f"no data set {name!r}: it is no file here, and the hub does not have it") from None
    except (DatasetsError, ValueError, OSError) as error:
        # datasets wraps what went wrong; the innermost cause names the row or the split
        if "corresponds to no data" in str(error):
            raise DataError(f"data set {name!r} has no rows") from None
        raise DataError(f"data set {name!r} cannot be read: {_innermost(error)}") from error
    if len(rows) == 0:
        raise DataError(f"data set {name!r} has no rows")
    _check_columns(name, set(rows.column_names), text_field)
    return rows


def is_conversational(rows: Dataset) -> bool:
    """Whether rows hold messages, which need a chat template, and not finished text."""
    return any(isinstance(rows[0].get(column), list) for column in ("messages", "prompt", "completion"))


def _from_file(path: Path) -> Dataset:
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.suffix.lower() not in FORMATS:
        raise DataError(f"{path} is no {', '.join(FORMATS)} file")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    return load_dataset(FORMATS[path.suffix.lower()], data_files=str(path), split="train")


def _check_columns(name: str, found: set[str], text_field: str) -> None:
    wanted = {**COLUMNS, "plain text": {text_field}}
    if any(columns <= found for columns in wanted.values()):
        return
    forms = "; ".join(f"{' + '.join(sorted(columns))} ({form})" for form, columns in wanted.items())
    raise DataError(f"data set {name!r} has the columns {', '.join(sorted(found))}, and none of these: {forms}")


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
