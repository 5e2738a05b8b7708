"""What can be wrong with data: a row, which is left out and reported, or the whole, which is refused."""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN = 5
"""Bad rows that are written out; the others are counted."""


class DataError(ValueError):
    """There is no such data, it is empty, or it has not the columns to train on."""


class BadRow(Exception):
    """One row cannot be used; the text says why."""


@dataclass
class Problems:
    """The rows of one data set that could not be used.

    Attributes:
        count: how many.
        lines: ``file:row: reason`` of the first few.
    """

    count: int = 0
    lines: list[str] = field(default_factory=list)

    def add(self, name: str, row: int, reason: object) -> None:
        """Note that a row cannot be used."""
        self.note(f"{name}:{row}", reason)

    def note(self, name: str, reason: object) -> None:
        """Note that something of this name cannot be used."""
        self.count += 1
        if len(self.lines) < SHOWN:
            self.lines.append(f"{name}: {reason}")

    def __str__(self) -> str:
        more = self.count - len(self.lines)
        return "\n".join([*self.lines, *([f"and {more:,} more"] if more else [])])


def shown(value: object, limit: int = 40) -> str:
    """A value as a message quotes it: one short line."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def kind(value: object) -> str:
    """What a value is, in words that do not need Python."""
    if isinstance(value, bool):
        return f"{value}".lower()
    if isinstance(value, int | float):
        return f"the number {shown(value)}"
    if isinstance(value, str):
        return f"the text {shown(value)}"
    if isinstance(value, list | tuple):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def no_unicode(text: str) -> int | None:
    r"""Position, from 1, of a character that is none; None when the text is sound.

    Bytes that are not UTF-8 are read as lone surrogates, and JSON can spell such (``\ud83d``). No tokenizer takes them.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start + 1
    return None
