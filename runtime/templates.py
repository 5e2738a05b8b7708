"""Texts that are put together from the columns of a row: ``"{question} [[Context: {context}]]"``.

``{column}`` is the column's text. A part in double square brackets is left out when one of its columns is empty. ``{{``
and ``}}`` stand for braces. Names are looked up in the row and nowhere else: a template comes from a file that someone
else may have written, and ``str.format`` would follow ``{column.__class__…}`` into the interpreter.
"""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .problems import BadRow, DataError, kind, no_unicode

# The last of several brackets closes a part, so that [[see [{source}]]] holds "see [{source}]".
_OPTIONAL = re.compile(r"\[\[(.*?)\]\](?!\])", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """A stretch of a template.

    Attributes:
        pieces: (literal text, the column that follows it or None), in order.
        optional: whether it is left out when one of its columns is empty.
    """

    pieces: tuple[tuple[str, str | None], ...]
    optional: bool = False


@dataclass(frozen=True)
class Template:
    """A text with places for columns. :meth:`parse` makes one of what a user wrote.

    Attributes:
        parts: its stretches, in order.
        numbers: whether columns may hold numbers, which are written out. Where a user names the columns that is meant;
            where they are found by their names, a number among texts is more likely a mistake.
    """

    parts: tuple[Part, ...]
    numbers: bool = True

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read a template.

        Raises:
            DataError: when a bracket is open, or braces hold anything but the name of a column.
        """
        parts, end = [], 0
        for match in _OPTIONAL.finditer(text):
            parts += [_part(text, text[end : match.start()], False), _part(text, match[1], True)]
            end = match.end()
        parts.append(_part(text, text[end:], False))
        return cls(tuple(part for part in parts if part.pieces))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names, each once."""
        return tuple(dict.fromkeys(column for part in self.parts for _, column in part.pieces if column is not None))

    def check(self, setting: str, known: Iterable[str]) -> None:
        """Compare with the columns that there are.

        Raises:
            DataError: naming the setting, the unknown column, the closest known one, and all of them.
        """
        known = list(known)
        for column in self.columns:
            if column not in known:
                close = difflib.get_close_matches(column, known, n=1)
                meant = f", did you mean {close[0]!r}?" if close else ";"
                raise DataError(f"{setting}: unknown column {column!r}{meant} the columns are {', '.join(known)}")

    def fill(self, row: Mapping[str, Any]) -> str:
        """The text for a row.

        Raises:
            BadRow: when a column outside of the optional parts is empty, or one holds neither text nor a number.
        """
        filled: list[str] = []
        for part in self.parts:
            values = [None if column is None else self._text(row, column) for _, column in part.pieces]
            missing = [c for (_, c), v in zip(part.pieces, values, strict=True) if c is not None and v is None]
            if missing and part.optional:
                continue
            if missing:
                raise BadRow(nothing(row, missing[0]))
            filled += [literal + (value or "") for (literal, _), value in zip(part.pieces, values, strict=True)]
        return "".join(filled)

    def _text(self, row: Mapping[str, Any], column: str) -> str | None:
        value = row.get(column)
        if self.numbers and isinstance(value, int | float) and value == value:
            return str(value)
        return column_text(value, column)


def column_text(value: Any, column: str) -> str | None:
    """A column's text, or None when it holds none.

    Raises:
        BadRow: when it holds something else.
    """
    if value is None or value != value:  # NaN is how tables say that there is nothing
        return None
    if not isinstance(value, str):
        advice = f" (a template writes numbers as text: {{{column}}})" if isinstance(value, int | float) else ""
        raise BadRow(f"column {column!r} holds {kind(value)}, not text{advice}")
    check_unicode(value, f"column {column!r}")
    return value if value.strip() else None


def nothing(row: Mapping[str, Any], column: str) -> str:
    """The words for a column without text."""
    return f"column {column!r} is {'empty' if isinstance(row.get(column), str) else 'null'}"


def check_unicode(value: str, where: str) -> None:
    """Refuse text that cannot be written as UTF-8.

    Raises:
        BadRow: when there is such a character.
    """
    if position := no_unicode(value):
        raise BadRow(f"{where} is not UTF-8 at character {position} (or half of a surrogate pair)")


def _part(whole: str, text: str, optional: bool) -> Part:
    if "[[" in text or (not optional and "]]" in text):
        raise DataError(f"{whole!r}: a part in [[double brackets]] is not closed, not opened, or holds another")
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise DataError(f"{whole!r}: {error}; braces hold a column's name, and {{{{ stands for one brace") from None
    for _, column, form, conversion in pieces:
        if column is None:
            continue
        if not column.strip() or form or conversion or re.search(r"[.\[\]{}]", column):
            written = column + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise DataError(
                f"{whole!r}: {{{written}}} is not allowed; braces hold the name of a column, such as {{question}}, "
                "and nothing else: no attribute, index, conversion or format"
            )
    if optional and all(column is None for _, column, _, _ in pieces):
        raise DataError(f"{whole!r}: [[{text}]] names no column; it would never be left out")
    return Part(tuple((literal, column) for literal, column, _, _ in pieces), optional)
